"""The Slurm scripts on a real Slurm: jobs that are stopped in every way there is, and still end with the whole file."""

from __future__ import annotations

import json
import os
import random
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import slurm_cluster
from tests.conftest import Saver
from tests.fault_ranks import run_command
from tests.slurm_cluster import ROOT, Cluster, until

pytestmark = [pytest.mark.spmd, pytest.mark.slow]
SCRIPT, ARRAY = ROOT / "launch" / "slurm.sbatch", ROOT / "launch" / "slurm_array.sbatch"
SOON = 90
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")


@pytest.fixture(scope="module")
def slurm() -> Iterator[Cluster]:
    """A cluster that sends a step's signals to all of its processes."""
    slurm_cluster.require()
    cluster = Cluster("proctrack/linuxproc")
    yield cluster
    cluster.close()


@pytest.fixture(scope="module")
def tiny(checkpoint: Saver) -> str:
    return str(checkpoint("llama-gqa", "hf"))


def lines(n: int) -> str:
    rng = random.Random(7)
    found = []
    for i in range(n):
        body = {"prompt": "to be or not " * rng.randint(1, 3), "max_tokens": rng.randint(20, 90), "ignore_eos": True}
        found.append(json.dumps({"custom_id": f"c{i}", **body, "temperature": i % 2, "seed": i}) + "\n")
    return "".join(found)


class Job:
    """A batch command in a folder of its own, submitted as often as it takes."""

    def __init__(self, slurm: Cluster, checkpoint: str, folder: Path, n_lines: int, *flags: str) -> None:
        self.slurm, self.folder, self.output = slurm, folder, folder / "out.jsonl"
        folder.mkdir(exist_ok=True)
        (folder / "in.jsonl").write_text(lines(n_lines))
        self.command = ["batch", "--ckpt_dir", checkpoint, "--input_file", "in.jsonl", "--output_file=out.jsonl"]
        self.command += [
            "--dtype=float32",
            "--device=cpu",
            "--max_seq_len=192",
            "--max_batch_size=4",
            "--grace=3",
            *flags,
        ]

    def submit(self, *flags: str, script: Path = SCRIPT, **env: str) -> str:
        """The id of the job."""
        words = ["sbatch", "--parsable", *flags, str(script), *self.command]
        return self.slurm.call(*words, cwd=self.folder, env=env).strip()

    def status(self, name: str = "out.jsonl.status.json") -> dict[str, Any]:
        try:
            found: dict[str, Any] = json.loads((self.folder / name).read_text())
        except FileNotFoundError:
            return {"state": "none", "done": 0}
        return found

    def log(self) -> str:
        return "\n".join(path.read_text() for path in sorted(self.folder.glob("*.out")))

    def records(self) -> list[str]:
        return sorted(self.output.read_text().splitlines())

    def midway(self, job: str, beyond: int = 0) -> int:
        """Wait until the job has done some lines more; how many are done."""

        def ready() -> bool:
            found = self.status()
            assert found["state"] != "completed" and self.slurm.state(job) not in ENDED, self.log()
            return bool(found["state"] == "running" and found["done"] > beyond)

        until(ready, lambda: f"{self.slurm.show(job)}\n{self.log()}", SOON)
        return int(self.status()["done"])

    def end(self, job: str, *states: str, within: float = SOON) -> None:
        """Wait for the end of the job, which is to be in one of these states."""
        until(
            lambda: self.slurm.state(job) in ENDED,
            lambda: f"{self.slurm.show(job)}\n{self.status()}\n{self.log()}\n{self.slurm.logs()}",
            within,
        )
        assert self.slurm.state(job) in states, self.log()


@pytest.fixture(scope="module")
def whole(tiny: str, tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[str]]:
    """Results of a job that nothing stops, on two ranks without Slurm, by its number of lines."""
    found = {}
    for n in (12, 240, 960):
        folder = tmp_path_factory.mktemp("whole")
        job = Job(None, tiny, folder, n)  # type: ignore[arg-type]
        argv = [
            a.replace("out.jsonl", str(folder / "out.jsonl")).replace("in.jsonl", str(folder / "in.jsonl"))
            for a in job.command
        ]
        ended = run_command(2, argv, folder)
        assert ended.codes == [0, 0], ended.log
        found[n] = job.records()
    return found


def test_two_nodes_finish_a_job(slurm: Cluster, tiny: str, whole: dict[int, list[str]], tmp_path: Path) -> None:
    job = Job(slurm, tiny, tmp_path, 12)
    job.end(job.submit("--nodes=2"), "COMPLETED")
    assert job.records() == whole[12]
    assert "float32 on 2 x cpu" in job.log()


def test_a_rank_for_every_gpu(slurm: Cluster, tiny: str, whole: dict[int, list[str]], tmp_path: Path) -> None:
    job = Job(slurm, tiny, tmp_path, 12)
    job.end(job.submit("--gpus-per-node=2"), "COMPLETED")
    assert job.records() == whole[12]
    assert "float32 on 2 x cpu" in job.log()


def test_a_job_stopped_in_every_way_is_requeued_and_ends_whole(
    slurm: Cluster, tiny: str, whole: dict[int, list[str]], tmp_path: Path
) -> None:
    job = Job(slurm, tiny, tmp_path, 960)  # so that a fast machine is still at work at the last way
    number = job.submit(NPROC_PER_NODE="2")
    urgent = ""
    done = 0
    for turn, way in enumerate(["term", "requeue", "batch", "preempt"], start=1):
        done = job.midway(number, done)
        if way == "term":  # every process of the step gets it, torchrun and ranks
            slurm.call("scancel", "--signal=TERM", number)
        elif way == "requeue":
            slurm.call("scontrol", "requeue", number)
        elif way == "batch":  # the script alone
            slurm.call("scancel", "--batch", "--signal=USR1", number)
        else:
            words = ["sbatch", "--parsable", "--partition=urgent", "--nodes=2", "--exclusive", "--output=/dev/null"]
            urgent = slurm.call(*words, "--wrap=sleep 1", cwd=tmp_path).strip()
        until(lambda turn=turn: int(slurm.show(number)["Restarts"]) == turn, job.log, SOON)  # type: ignore[misc]
        if way == "requeue":  # Slurm counts its own restart at once, while the ranks are at their last lines
            until(lambda: job.status()["state"] == "preempted", job.log, SOON)
        stopped = job.status()
        assert stopped["state"] == "preempted", (way, job.log())
        done = stopped["done"]
    job.end(number, "COMPLETED", within=360)
    assert slurm.state(urgent) == "COMPLETED"
    assert job.records() == whole[960]
    assert job.log().count("stopped early, requeued") == 3
    assert not re.search("second SIGTERM|SIGUSR1", job.log())


def test_what_is_not_requeued_goes_on_when_submitted_again(
    slurm: Cluster, tiny: str, whole: dict[int, list[str]], tmp_path: Path
) -> None:
    job = Job(slurm, tiny, tmp_path, 240)
    number = job.submit("--no-requeue", NPROC_PER_NODE="2")
    done = job.midway(number)
    slurm.call("scancel", "--signal=USR1", number)
    job.end(number, "FAILED")
    assert slurm.show(number)["ExitCode"] == "75:0"
    assert job.status()["state"] == "preempted" and "not requeued; submit the same line again" in job.log()

    number = job.submit(NPROC_PER_NODE="2")
    done = job.midway(number, done)
    slurm.call("scancel", "--signal=KILL", f"{number}.0")
    job.end(number, "FAILED")
    assert slurm.show(number)["Restarts"] == "0"

    number = job.submit(NPROC_PER_NODE="2")
    job.midway(number, done)
    slurm.call("scancel", number)
    job.end(number, "CANCELLED")

    number = job.submit(NPROC_PER_NODE="2")
    job.end(number, "COMPLETED")
    assert job.records() == whole[240]


def test_the_time_limit_is_foreseen(slurm: Cluster, tiny: str, whole: dict[int, list[str]], tmp_path: Path) -> None:
    # 60 s less the grace and a margin of 15 leave 20 s, of which a slow start takes most; one line at a time, a fast
    # machine does not answer them all. Slurm's own signal is turned off.
    job = Job(slurm, tiny, tmp_path, 960, "--grace=25", "--max_batch_size=1")
    job.command.remove("--grace=3")
    job.command.remove("--max_batch_size=4")
    number = job.submit("--time=1", "--signal=B:URG@1", NPROC_PER_NODE="2", STEP_SECONDS="0.0005")

    def stopped_midway() -> bool:  # a start that took all of the time answers nothing, and has its time again
        found = job.status()
        return int(slurm.show(number)["Restarts"]) >= 1 and found["state"] == "preempted" and found["done"] > 0

    until(stopped_midway, job.log, 3 * SOON)
    assert job.status()["done"] < 960
    slurm.call("scontrol", "update", f"JobId={number}", "TimeLimit=30")
    job.end(number, "COMPLETED", within=4 * SOON)  # the same lines keep a slow and busy machine for long
    assert job.records() == whole[960]


def test_a_signal_that_reaches_the_step_s_first_process_only(
    tiny: str, whole: dict[int, list[str]], tmp_path: Path
) -> None:
    slurm_cluster.require()
    slurm = Cluster("proctrack/pgid")
    try:
        job = Job(slurm, tiny, tmp_path, 240)
        number = job.submit("--no-requeue", "--nodes=2")
        job.midway(number)
        slurm.call("scancel", "--signal=TERM", number)
        job.end(number, "FAILED")
        assert (slurm.show(number)["ExitCode"], job.status()["state"]) == ("75:0", "preempted")
        assert not re.search("second SIGTERM|SIGUSR1", job.log())
    finally:
        slurm.close()


def test_an_array_loses_a_task_requeues_one_and_is_joined_late(
    slurm: Cluster, tiny: str, whole: dict[int, list[str]], tmp_path: Path
) -> None:
    job = Job(slurm, tiny, tmp_path, 240, "--lease_timeout=4", "--log_every=1")
    array = job.submit("--array=0-1", script=ARRAY)
    tasks = [f"{array}_{i}" for i in range(2)]
    for task in tasks:
        until(lambda task=task: (tmp_path / f"out.jsonl.task-{task}.status.json").exists(), job.log, SOON)  # type: ignore[misc]
    # One task goes by the number of the whole array: requeueing that number would take the other along.
    (stopped,) = [task for task in tasks if slurm.show(task)["JobId"] == array]
    (lost,) = set(tasks) - {stopped}
    slurm.call("scancel", "--signal=KILL", f"{slurm.show(lost)['JobId']}.0")
    slurm.call("scancel", "--signal=USR1", stopped)
    late = job.submit("--array=5", script=ARRAY)
    until(lambda: slurm.show(stopped)["Restarts"] == "1", job.log, SOON)
    job.end(lost, "FAILED")
    assert slurm.show(lost)["Restarts"] == "0"
    assert job.status(f"out.jsonl.task-{lost}.status.json")["state"] != "completed"
    for task in (stopped, f"{late}_5"):
        job.end(task, "COMPLETED")
        assert job.status(f"out.jsonl.task-{task}.status.json")["state"] == "completed"
    assert job.status()["state"] == "completed"
    assert job.records() == whole[240]
    assert not list(tmp_path.glob("out.jsonl.part*")) and not (tmp_path / "out.jsonl.leases").exists()


@pytest.mark.parametrize(("tasks", "nodes"), [(2, 1), (3, 2)])
def test_srun_without_torchrun(
    slurm: Cluster, tiny: str, whole: dict[int, list[str]], tmp_path: Path, tasks: int, nodes: int
) -> None:
    job = Job(slurm, tiny, tmp_path, 12)
    words = ["srun", f"--ntasks={tasks}", f"--nodes={nodes}", "python", "-m", "llama_dist", *job.command]
    slurm.call(*words, cwd=tmp_path, within=SOON)
    records = [json.loads(line) for line in job.records()]
    assert len(records) == 12
    if tasks == 2:
        assert job.records() == whole[12]


def test_a_script_finds_the_environment_of_its_repository(slurm: Cluster, tiny: str, tmp_path: Path) -> None:
    (tmp_path / "launch").mkdir()
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / "launch" / SCRIPT.name).write_bytes(SCRIPT.read_bytes())
    python = tmp_path / ".venv" / "bin" / "python"
    python.write_text(f'#!/bin/sh\nexec {os.path.join(slurm_cluster.sys.prefix, "bin", "python")} "$@"\n')
    python.chmod(0o755)
    bare = {"PATH": "/usr/bin:/bin:/usr/sbin", "PYTHONPATH": ""}
    words = ["sbatch", "--parsable", f"--output={tmp_path}/log", str(tmp_path / "launch" / SCRIPT.name)]
    number = slurm.call(*words, "inspect", "--ckpt_dir", tiny, cwd=ROOT, env=bare).strip()
    slurm.wait(number, "COMPLETED", "FAILED")
    log = (tmp_path / "log").read_text()
    assert slurm.state(number) == "COMPLETED", log
    assert re.search(r"\bllama\b", log)
