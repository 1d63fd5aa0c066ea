"""Whatever happens to any process at any tick, the job ends soon and says why, and the next run finishes it whole."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests import assets
from tests.conftest import Saver
from tests.fault_ranks import Ended, Fault, run_command

pytestmark = [pytest.mark.spmd, pytest.mark.slow]
ROOT = Path(__file__).parent.parent
TIMEOUT = 8  # longer than a process of a busy machine stands still


class Job:
    """One batch job on a tiny checkpoint, run as often as it takes."""

    def __init__(self, checkpoint: str, folder: Path, lines: list[dict[str, Any]], *flags: str) -> None:
        self.folder, self.output = folder, folder / "out.jsonl"
        source = folder / "in.jsonl"
        source.write_text("".join(json.dumps(line) + "\n" for line in lines))
        self.argv = ["batch", "--ckpt_dir", checkpoint, "--input_file", str(source), "--output_file", str(self.output)]
        self.argv += ["--dtype=float32", "--device=cpu", "--max_seq_len=128", "--max_batch_size=3", "--check_every=1"]
        self.argv += [f"--timeout={TIMEOUT}", "--grace=20", *flags]

    def run(self, world: int, fault: Fault | None = None) -> Ended:
        return run_command(world, self.argv, self.folder, fault)

    def results(self) -> list[str]:
        return sorted(self.output.read_text().splitlines())

    def status(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(Path(f"{self.output}.status.json").read_text())
        return found


def lines(n: int) -> list[dict[str, Any]]:
    rng = random.Random(3)
    found: list[dict[str, Any]] = []
    for i in range(n):
        body = {"prompt": "to be or not " * rng.randint(1, 3), "max_tokens": rng.randint(2, 12), "seed": i}
        found.append({"custom_id": f"c{i}", **body, "temperature": rng.choice([0, 1]), "n": rng.choice([1, 1, 2])})
    found[5] = {"custom_id": "c5", "prompt": ""}
    return found


@pytest.fixture(scope="module")
def tiny(checkpoint: Saver) -> str:
    return str(checkpoint("llama-gqa", "hf"))


@pytest.fixture(scope="module")
def whole(tiny: str, tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[str]]:
    """What an uninterrupted run gives, by world size."""
    found = {}
    for world in (1, 2, 3):
        job = Job(tiny, tmp_path_factory.mktemp("whole"), lines(24))
        ended = job.run(world)
        assert ended.codes == [0] * world, ended.log
        found[world] = job.results()
        assert len(found[world]) == 24
    return found


def texts(results: list[str]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for line in results:
        record = json.loads(line)
        assert record["custom_id"] not in found, "a line was answered twice"
        body = record["response"] and record["response"]["body"]
        found[record["custom_id"]] = (
            [c.get("text") or c["message"]["content"] for c in body["choices"]] if body else [record["error"]["code"]]
        )
    return found


@pytest.mark.parametrize(("world", "rank"), [(2, 0), (2, 1), (3, 0), (3, 1), (3, 2)])
def test_killed_ten_times_and_finished(
    tiny: str, tmp_path: Path, whole: dict[int, list[str]], world: int, rank: int
) -> None:
    """kill -9 of one rank at ten random ticks, one after the other, of one job; the same world size to the end."""
    job = Job(tiny, tmp_path, lines(24))
    dice, kills = random.Random(world * 10 + rank), 0
    while kills < 10:
        ended = job.run(world, Fault("kill", rank, dice.randint(0, 6)))
        if ended.codes == [0] * world:  # so little was left that the tick never came
            break
        kills += 1
        assert ended.codes[rank] == -signal.SIGKILL
        assert [c for i, c in enumerate(ended.codes) if i != rank] == [1] * (world - 1), ended.log
        assert ended.seconds < 5
        assert len(ended.errors) == 1 and re.search(rf"rank {rank} \(host \S+, pid \d+\) died", ended.errors[0])
    assert kills >= 4
    ended = job.run(world)
    assert ended.codes == [0] * world, ended.log
    assert job.results() == whole[world]
    assert job.status()["state"] == "completed" and job.status()["done"] == 24


def test_resumed_on_other_numbers_of_ranks(tiny: str, tmp_path: Path, whole: dict[int, list[str]]) -> None:
    job = Job(tiny, tmp_path, lines(24))
    for world, rank, tick in ((3, 0, 8), (1, 0, 5), (2, 1, 7)):
        assert job.run(world, Fault("kill", rank, tick)).codes[rank] == -signal.SIGKILL
    assert job.run(1).codes == [0]
    assert texts(job.results()) == texts(whole[1])


FAULTS = [
    (Fault("raise", 1, 4), r"\[rank 1\] ValueError: the cat sat on the keyboard"),
    (Fault("raise", 0, 4), r"\[rank 0\] ValueError: the cat sat on the keyboard"),
    (Fault("memory", 1, 4), r"\[rank 1\] MemoryError: no more of it"),
    (Fault("other", 1, 4), r"rank 1 differs from the others in the tokens sampled up to tick 5"),
]


@pytest.mark.parametrize(("fault", "says"), FAULTS, ids=lambda x: getattr(x, "kind", ""))
def test_a_failing_rank_ends_all_and_the_next_run_finishes(
    tiny: str, tmp_path: Path, whole: dict[int, list[str]], fault: Fault, says: str
) -> None:
    job = Job(tiny, tmp_path, lines(24))
    # three ranks, so that the odd one out of a disagreement is known
    ended = job.run(3, fault)
    assert ended.codes == [1, 1, 1] and ended.seconds < TIMEOUT + 5, ended.log
    assert len(ended.errors) == 1 and re.search(says, ended.errors[0]), ended.log
    assert job.status()["state"] == "failed"
    assert job.run(3).codes == [0, 0, 0]
    assert job.results() == whole[3]


@pytest.mark.parametrize("rank", [0, 1])
def test_a_stopped_rank_is_named(tiny: str, tmp_path: Path, whole: dict[int, list[str]], rank: int) -> None:
    job = Job(tiny, tmp_path, lines(24))
    ended = job.run(2, Fault("stop", rank, 4))
    assert ended.codes[1 - rank] == 1 and ended.seconds < TIMEOUT + 5, ended.log
    assert len(ended.errors) == 1 and re.search(rf"rank {rank} \(.*\) does not answer", ended.errors[0]), ended.log
    assert job.run(2).codes == [0, 0]
    assert job.results() == whole[2]


def test_a_stopped_replica_is_named_though_nobody_waits_for_it(tiny: str, tmp_path: Path) -> None:
    job = Job(tiny, tmp_path, lines(24), "--model_parallel_size=1")
    ended = job.run(2, Fault("stop", 1, 4))
    assert ended.codes[0] == 1 and ended.seconds < TIMEOUT + 5, ended.log
    assert len(ended.errors) == 1 and re.search(r"rank 1 \(.*\) does not answer", ended.errors[0]), ended.log
    assert job.run(2).codes == [0, 0]
    assert len(texts(job.results())) == 24


def test_odd_lines_do_not_stop_the_job(tiny: str, tmp_path: Path) -> None:
    odd: list[dict[str, Any]] = [
        {"prompt": "a", "max_tokens": 10**400},
        {"prompt": "a", "top_k": 10**400},
        {"prompt": "a", "temperature": 1e-320, "top_p": 0.5},
        {"prompt": "a", "repetition_penalty": 1e-40},
        {"prompt": "a", "custom_id": "\ud800"},
        {"prompt": "a", "custom_id": "good", "max_tokens": 3},
    ]
    job = Job(tiny, tmp_path, odd)
    ended = job.run(1)
    assert ended.codes == [0], ended.log
    records = [json.loads(line) for line in job.results()]
    assert len(records) == 6
    failed = {r["custom_id"]: r["error"]["message"] for r in records if r["error"]}
    for number, field in enumerate(("max_tokens", "top_k", "temperature", "repetition_penalty"), 1):
        assert field in failed[f"line-{number}"]
    assert "good" not in failed


def test_a_full_disk_is_said_and_what_was_written_stands(
    tiny: str, tmp_path: Path, whole: dict[int, list[str]]
) -> None:
    job = Job(tiny, tmp_path, lines(24))
    ended = job.run(2, Fault("full", 0, 3000))
    assert ended.codes == [1, 1], ended.log
    assert len(ended.errors) == 1 and "File too large" in ended.errors[0], ended.log
    assert 0 < job.output.stat().st_size <= 3000
    assert job.run(2).codes == [0, 0]
    assert job.results() == whole[2]


@pytest.mark.parametrize("rank", [0, 1])
def test_sigterm_of_any_rank_drains_the_job(tiny: str, tmp_path: Path, whole: dict[int, list[str]], rank: int) -> None:
    job = Job(tiny, tmp_path, lines(24))
    ended = job.run(2, Fault("term", rank, 3))
    assert ended.codes == [75, 75], ended.log
    assert job.status()["state"] == "preempted"
    before = job.results()
    assert 0 < len(before) < 24
    assert job.run(2).codes == [0, 0]
    assert job.results() == whole[2]
    assert set(before) <= set(whole[2]), "a result changed"


@pytest.mark.parametrize("rank", [0, 1])
def test_a_second_sigterm_leaves_within_a_second(tiny: str, tmp_path: Path, rank: int) -> None:
    long = [{"custom_id": f"c{i}", "prompt": "to be", "max_tokens": 120, "ignore_eos": True} for i in range(9)]
    job = Job(tiny, tmp_path, long)
    ended = job.run(2, Fault("twice", rank, 3))
    assert ended.codes[rank] == 75 and ended.victim_seconds < 1, ended.log
    assert ended.seconds < 5
    assert job.status()["state"] == "preempted"
    assert job.run(2).codes == [0, 0]
    assert len(job.results()) == 9


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_told_to_stop_because_another_has_left_leaves_in_order(tiny: str, tmp_path: Path, rank: int) -> None:
    """torchrun sends SIGTERM to all ranks when the first ends with 75."""
    job = Job(tiny, tmp_path, lines(24))
    ended = job.run(2, Fault("late", rank, 3))
    assert ended.codes == [75, 75] and not ended.errors, ended.log
    assert job.status()["state"] == "preempted"


def test_the_real_model_killed_and_resumed(tmp_path: Path) -> None:
    source = [
        {"custom_id": f"q{i}", "messages": [{"role": "user", "content": q}], "max_tokens": 12, "temperature": 0}
        for i, q in enumerate(["What do bees make?", "Name a colour.", "Is water wet?", "Who was Ada Lovelace?"])
    ]
    model = str(assets.smollm2_gguf())

    def job(name: str) -> Job:
        (tmp_path / name).mkdir()
        made = Job(model, tmp_path / name, source, "--dtype=bfloat16", "--timeout=60")
        made.argv.remove("--dtype=float32")
        made.argv.remove(f"--timeout={TIMEOUT}")
        return made

    first, whole = job("killed"), job("whole")
    assert first.run(2, Fault("kill", 1, 9)).codes == [1, -9]
    assert first.run(2, Fault("kill", 0, 4)).codes == [-9, 1]
    ended = first.run(2)
    assert ended.codes == [0, 0], ended.log
    assert sorted(texts(first.results())) == ["q0", "q1", "q2", "q3"]
    assert whole.run(2).codes == [0, 0]
    assert first.results() == whole.results()


def test_torchrun_killed_and_resumed_under_torchrun(tiny: str, tmp_path: Path, whole: dict[int, list[str]]) -> None:
    job = Job(tiny, tmp_path, lines(24))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "llama_dist"]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    first = subprocess.Popen([*command, *job.argv], env=env, stderr=subprocess.DEVNULL)
    until = time.monotonic() + 60
    while not (job.output.exists() and job.output.stat().st_size) and time.monotonic() < until:
        time.sleep(0.005)
    first.kill()
    first.wait()
    until = time.monotonic() + 5
    while orphans := subprocess.run(["pgrep", "-af", str(job.output)], capture_output=True, text=True).stdout:
        assert time.monotonic() < until, orphans
        time.sleep(0.05)
    done = subprocess.run([*command, *job.argv], env=env, capture_output=True, text=True, timeout=90)
    assert done.returncode == 0, done.stderr
    assert job.results() == whole[2]
