"""`batch --shared_output` from end to end: tasks that are killed, stopped, told to stop or late, and one whole file."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import pytest

from llama_dist.__main__ import main
from tests.cluster_jobs import paced
from tests.conftest import Saver
from tests.fault_ranks import Ended, Fault, run_command

pytestmark = [pytest.mark.spmd, pytest.mark.slow]
ROOT = Path(__file__).parent.parent
N = 60


def lines() -> list[dict[str, Any]]:
    dice = random.Random(8)
    found: list[dict[str, Any]] = []
    for i in range(N):
        body = {"prompt": "to be or not " * dice.randint(1, 3), "max_tokens": dice.randint(20, 60), "ignore_eos": True}
        found.append({"custom_id": f"c{i}", **body, "temperature": i % 2, "seed": i, "n": 2 if i % 5 == 0 else 1})
    found[8] = {"custom_id": "c1", "prompt": "again"}
    return found


class Job:
    """One batch job on a tiny checkpoint, run by several tasks at once."""

    def __init__(self, checkpoint: str, folder: Path) -> None:
        self.folder, self.output = folder, folder / "out.jsonl"
        source = folder / "in.jsonl"
        source.write_text("".join(json.dumps(line) + "\n" for line in lines()))
        self.plain = ["batch", "--ckpt_dir", checkpoint, "--input_file", str(source)]
        self.plain += ["--output_file", str(self.output), "--dtype=float32", "--device=cpu", "--max_seq_len=128"]
        self.plain += ["--max_batch_size=3", "--check_every=1", "--timeout=20", "--grace=0", "--ordered"]
        self.argv = [*self.plain, "--shared_output", "--lease_timeout=2"]

    def task(self, pool: ThreadPoolExecutor, name: str, fault: Fault | None = None, world: int = 1) -> Future[Ended]:
        place = self.folder / name
        place.mkdir()
        return pool.submit(run_command, world, self.argv, place, fault)

    def results(self) -> int:
        """Results in the part files."""
        found = 0
        for path in self.folder.glob("out.jsonl.part-*"):
            found += path.read_bytes().count(b"\n") if path.exists() else 0
        return found

    def wait_for(self, n: int) -> None:
        until = time.monotonic() + 60
        while self.results() < n:
            assert time.monotonic() < until and not self.output.exists(), f"{self.results()} results"
            time.sleep(0.005)

    def states(self) -> dict[str, str]:
        """The state in each status file: the job's and its tasks'."""
        return {path.name: json.loads(path.read_text())["state"] for path in self.folder.glob("*.status.json")}

    def status(self) -> tuple[Any, ...]:
        found = json.loads(Path(f"{self.output}.status.json").read_text())
        return tuple(found[name] for name in ("state", "done", "failed", "total"))

    def popen(self) -> subprocess.Popen[bytes]:
        env = {**os.environ, **paced(0.01), "OMP_NUM_THREADS": "1"}
        return subprocess.Popen([sys.executable, "-m", "llama_dist", *self.argv], env=env, stderr=subprocess.DEVNULL)


@pytest.fixture(scope="module")
def tiny(checkpoint: Saver) -> str:
    return str(checkpoint("llama-gqa", "hf"))


@pytest.fixture(scope="module")
def whole(tiny: str, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A plain uninterrupted run's file."""
    job = Job(tiny, tmp_path_factory.mktemp("whole"))
    (job.folder / "alone").mkdir()
    ended = run_command(1, job.plain, job.folder / "alone")
    assert ended.codes == [0], ended.log
    return job.output.read_bytes()


def check_end(job: Job, whole: bytes) -> None:
    assert job.output.read_bytes() == whole
    assert job.status() == ("completed", N, 1, N)
    kept = {"in.jsonl", "out.jsonl", "out.jsonl.job.json"}
    left = [p.name for p in job.folder.iterdir() if p.is_file() and p.name not in kept]
    assert all(name.endswith(".status.json") for name in left), left
    assert not list(job.folder.glob("out.jsonl.leases*"))


def test_one_killed_one_told_to_stop_one_late(tiny: str, tmp_path: Path, whole: bytes) -> None:
    """The last stands still meanwhile with what it has taken, or it could be through before the others are struck."""
    job = Job(tiny, tmp_path)
    go = tmp_path / "late" / "go"
    with ThreadPoolExecutor() as pool:
        killed = job.task(pool, "killed", Fault("kill", 0, 65))
        told = job.task(pool, "told", Fault("term", 0, 65))
        job.wait_for(1)
        late = job.task(pool, "late", Fault("hold", 0, 30, go))
        wait([killed, told])
        go.touch()
        ended = {name: task.result() for name, task in (("killed", killed), ("told", told), ("late", late))}
    assert ended["killed"].codes == [-signal.SIGKILL]
    assert ended["told"].codes == [75], ended["told"].log
    assert ended["late"].codes == [0], ended["late"].log
    assert "is lost: its process is gone" in ended["late"].log + ended["told"].log
    check_end(job, whole)
    assert sorted(job.states().values()) == ["completed", "completed", "preempted", "running"]


def test_worlds_of_several_ranks_and_replicas(tiny: str, tmp_path: Path, whole: bytes) -> None:
    """A task of two replicas beside one that is killed, for which they leave enough; each takes a part of the lines."""
    job = Job(tiny, tmp_path)
    go = tmp_path / "replicas" / "go"
    with ThreadPoolExecutor() as pool:
        killed = job.task(pool, "killed", Fault("kill", 0, 65))
        job.argv.append("--model_parallel_size=1")
        replicas = job.task(pool, "replicas", Fault("hold", 0, 30, go), world=2)
        wait([killed])
        go.touch()
        ended = replicas.result()
    assert killed.result().codes == [-signal.SIGKILL]
    assert ended.codes == [0, 0], ended.log
    check_end(job, whole)
    (done,) = [state for name, state in job.states().items() if "task" in name and state == "completed"]
    assert done


def test_tasks_on_other_numbers_of_ranks(tiny: str, tmp_path: Path, whole: bytes) -> None:
    job = Job(tiny, tmp_path)
    with ThreadPoolExecutor() as pool:
        tasks = [job.task(pool, "one"), job.task(pool, "two", world=2)]
        codes = [task.result().codes for task in tasks]
    assert codes == [[0], [0, 0]]
    mine, theirs = ([json.loads(line) for line in raw.splitlines()] for raw in (job.output.read_bytes(), whole))
    assert [r["id"] for r in mine] == [r["id"] for r in theirs]
    assert job.status() == ("completed", N, 1, N)


def test_stopped_beyond_the_timeout_and_woken(tiny: str, tmp_path: Path, whole: bytes) -> None:
    job = Job(tiny, tmp_path)
    sleeper = job.popen()
    try:
        job.wait_for(3)
        sleeper.send_signal(signal.SIGSTOP)
        with ThreadPoolExecutor() as pool:
            ended = job.task(pool, "other").result()
        assert ended.codes == [0], ended.log
        assert "is lost: no sign of life" in ended.log
        assert job.output.read_bytes() == whole and job.status() == ("completed", N, 1, N)
        sleeper.send_signal(signal.SIGCONT)
        assert sleeper.wait(30) == 0
    finally:
        sleeper.kill()
    check_end(job, whole)


def test_all_killed_then_a_plain_run(tiny: str, tmp_path: Path, whole: bytes) -> None:
    job = Job(tiny, tmp_path)
    with ThreadPoolExecutor() as pool:
        tasks = [job.task(pool, f"{i}", Fault("kill", i % 2, 60 + 9 * i), world=1 + i % 2) for i in range(2)]
        codes = [task.result().codes for task in tasks]
    assert codes[0] == [-signal.SIGKILL] and codes[1][1] == -signal.SIGKILL
    assert job.results() and not job.output.exists()
    (tmp_path / "plain").mkdir()
    ended = run_command(1, job.plain, tmp_path / "plain")
    assert ended.codes == [0], ended.log
    assert [json.loads(r)["id"] for r in job.output.read_bytes().splitlines()] == [
        json.loads(r)["id"] for r in whole.splitlines()
    ]
    assert not list(tmp_path.glob("*.part-*")) and not list(tmp_path.glob("*.leases*"))
    (tmp_path / "again").mkdir()
    ended = run_command(1, job.argv, tmp_path / "again")
    assert ended.codes == [0] and "loaded in" not in ended.log, "a finished job reads no weights"


def test_torchrun_tasks(tiny: str, tmp_path: Path) -> None:
    """As in a job array: each task under its own torchrun, named by Slurm's variables."""
    job = Job(tiny, tmp_path)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=1", "-m", "llama_dist"]
    tasks = []
    for k in (1, 2):
        env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        env |= {"SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": str(k)}
        tasks.append(subprocess.Popen([*command, *job.argv], env=env, stderr=subprocess.PIPE))
    try:
        for task in tasks:
            _, err = task.communicate(timeout=90)
            assert task.returncode == 0, err.decode()
    finally:
        for task in tasks:
            task.kill()
    assert job.states() == {f"out.jsonl.{name}status.json": "completed" for name in ("", "task-7_1.", "task-7_2.")}
    assert len(job.output.read_bytes().splitlines()) == N


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--input_file", "-"], "needs files that every task can open, not -"),
        (["--output_file", "-"], "needs files that every task can open, not -"),
        (["--lease_timeout", "0.5"], "--lease_timeout is 0.5, must be 1 second or more"),
        (["--input_file", "/dev/fd/0"], "is a pipe"),
    ],
)
def test_what_is_refused(
    tiny: str, tmp_path: Path, flags: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    given = dict(zip(flags[::2], flags[1::2], strict=True))
    (tmp_path / "in.jsonl").write_text('{"prompt": "a"}\n')
    flags = [
        f"{name}={value}"
        for name, value in {
            "--input_file": str(tmp_path / "in.jsonl"),
            "--output_file": str(tmp_path / "out.jsonl"),
            **given,
        }.items()
    ]
    reads, writes = os.pipe()
    saved = os.dup(0)
    os.dup2(reads, 0)
    try:
        code = main(["batch", "--ckpt_dir", tiny, "--shared_output", *flags])
    finally:
        os.dup2(saved, 0)
        for fd in (reads, writes, saved):
            os.close(fd)
    assert code == 2 and words in capsys.readouterr().err
