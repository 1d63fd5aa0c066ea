"""Under a real torchrun, with a tiny and a real model: whatever ends it, the same command finishes the job.

By default every process is killed once. The whole matrix takes most of an hour: `./launch/test.sh -m matrix`.
"""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests import assets
from tests.conftest import Saver
from tests.fault_ranks import Fault, run_command
from tests.torchrun_job import TORCHRUN, Ran, torchrun

pytestmark = [pytest.mark.spmd, pytest.mark.slow]
WORLDS = (2, 3)
N_LINES = {"tiny": 60, "real": 16}
LAST_TICK = {"tiny": 8, "real": 6}
MIDDLE = {"tiny": 14, "real": 12}  # a tick by which some lines are done


def lines(model: str) -> list[dict[str, Any]]:
    dice = random.Random(8)
    found: list[dict[str, Any]] = []
    for i in range(N_LINES[model]):
        body: dict[str, Any] = {"custom_id": f"c{i}", "max_tokens": dice.randint(2, 10), "seed": i}
        body |= {"temperature": dice.choice([0, 1]), "n": dice.choice([1, 1, 2])}
        if model == "real":
            body["messages"] = [{"role": "user", "content": f"What is {i} and {dice.randint(2, 99)}?"}]
        else:
            body["prompt"] = "to be or not " * dice.randint(1, 3)
        found.append(body)
    return found


@dataclass(frozen=True)
class Job:
    """One batch job of a model, in a folder of its own."""

    model: str
    folder: Path
    argv: list[str]

    def results(self) -> list[str]:
        return sorted((self.folder / "out.jsonl").read_text().splitlines())

    def status(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.folder / "out.jsonl.status.json").read_text())
        return found

    def torchrun(self, world: int, fault: Fault | None = None) -> Ran:
        return torchrun(world, self.argv, self.folder, fault)


def make_job(model: str, checkpoint: Saver, folder: Path) -> Job:
    path = str(checkpoint("llama-gqa", "hf")) if model == "tiny" else str(assets.smollm2_gguf())
    (folder / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines(model)))
    argv = ["batch", "--ckpt_dir", path, "--input_file", f"{folder}/in.jsonl", "--output_file", f"{folder}/out.jsonl"]
    argv += ["--dtype=float32", "--device=cpu", "--max_seq_len=128", "--max_batch_size=3", "--check_every=1"]
    return Job(model, folder, [*argv, "--timeout=10", "--grace=30"])


Whole = dict[tuple[str, int], list[str]]


@pytest.fixture(scope="module")
def whole() -> Whole:
    """Results of uninterrupted runs, made as they are asked for."""
    return {}


def check(job: Job, world: int, whole: Whole, checkpoint: Saver, tmp_path: Path) -> None:
    """Run the job to its end, and compare it with one that nothing happened to."""
    ran = job.torchrun(world)
    assert ran.code == 0, ran.log
    key = (job.model, world)
    if key not in whole:
        (tmp_path / "whole").mkdir()
        fresh = make_job(job.model, checkpoint, tmp_path / "whole")
        assert run_command(world, fresh.argv, fresh.folder).codes == [0] * world
        whole[key] = fresh.results()
        assert len(whole[key]) == N_LINES[job.model]
    # ids carry a digest of the input and flags, which are alike
    assert job.results() == whole[key]
    assert job.status()["state"] == "completed" and job.status()["done"] == N_LINES[job.model]


def kill(job: Job, world: int, victim: int, tick: int) -> bool:
    """Kill one process at a tick, if the job still has so many; whether it was."""
    ran = job.torchrun(world, Fault("kill", victim, tick))
    if ran.code == 0:
        return False
    if victim == TORCHRUN:
        assert ran.code == -9 and job.status()["state"] in ("preempted", "failed"), ran.log
    else:
        assert ran.code == 1 and len(ran.errors) == 1 and f"rank {victim} (host" in ran.errors[0], ran.log
    return True


@pytest.mark.parametrize(("model", "world"), [("tiny", 3), ("real", 2)])
def test_each_process_killed_once(model: str, world: int, whole: Whole, checkpoint: Saver, tmp_path: Path) -> None:
    (tmp_path / "job").mkdir()
    job, dice = make_job(model, checkpoint, tmp_path / "job"), random.Random(world)
    for victim in range(TORCHRUN, world):
        assert kill(job, world, victim, dice.randint(1, LAST_TICK[model]))
    check(job, world, whole, checkpoint, tmp_path)


@pytest.mark.matrix
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("world", "victim"), [(w, v) for w in WORLDS for v in range(TORCHRUN, w)])
@pytest.mark.parametrize("model", ["tiny", "real"])
def test_each_process_killed_ten_times(
    model: str, world: int, victim: int, whole: Whole, checkpoint: Saver, tmp_path: Path
) -> None:
    """At ten random ticks, of as many jobs as that takes."""
    dice, kills, jobs = random.Random(world * 10 + victim), 0, 0
    while kills < 10:
        (tmp_path / f"job{jobs}").mkdir()
        job = make_job(model, checkpoint, tmp_path / f"job{jobs}")
        jobs += 1
        while kills < 10 and kill(job, world, victim, dice.randint(0, LAST_TICK[model])):
            kills += 1
        check(job, world, whole, checkpoint, tmp_path)


@pytest.mark.matrix
@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("kind", ["stop", "raise", "memory", "term", "full"])
@pytest.mark.parametrize("model", ["tiny", "real"])
def test_other_faults(
    model: str, kind: str, rank: int, world: int, whole: Whole, checkpoint: Saver, tmp_path: Path
) -> None:
    if kind == "full" and rank:
        pytest.skip("only rank 0 writes")
    (tmp_path / "job").mkdir()
    job = make_job(model, checkpoint, tmp_path / "job")
    ran = job.torchrun(world, Fault(kind, rank, 2000 if kind == "full" else MIDDLE[model]))
    assert ran.code != 0, ran.log
    if kind == "term":
        assert job.status()["state"] == "preempted", ran.log
    else:
        assert len(ran.errors) == 1, ran.log
    assert 0 < len(job.results()) < N_LINES[model] or kind == "full"
    check(job, world, whole, checkpoint, tmp_path)
