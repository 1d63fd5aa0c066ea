"""Under a real torchrun: whatever ends one rank ends them all, soon, with one line that says what and on which rank."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
pytestmark = [pytest.mark.spmd, pytest.mark.slow]


class Job:
    """tests/fault_job.py on `ranks` ranks under torchrun; `pids` by rank once all have joined."""

    def __init__(self, mode: str, ranks: int, folder: Path) -> None:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
        self.log = folder / "stderr"
        env = {**os.environ, "PYTHONPATH": str(ROOT)}
        with self.log.open("w") as stderr:
            self.process = subprocess.Popen(
                [*command, str(ROOT / "tests" / "fault_job.py"), mode],
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
                env=env,
                start_new_session=True,
            )
        self.pids: dict[int, int] = {}
        assert self.process.stdout is not None
        text = ""
        while len(self.pids) < ranks:
            piece = os.read(self.process.stdout.fileno(), 4096).decode()
            assert piece, f"the job ended before all ranks were ready: {self.log.read_text()}"
            text += piece
            self.pids = {int(r): int(p) for r, p in re.findall(r"ready (\d) (\d+)\b", text)}

    def alive(self) -> list[int]:
        """Ranks whose process still runs (a zombie does not)."""
        found = []
        for rank, pid in self.pids.items():
            try:
                state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
            except OSError:
                continue
            if state != "Z":
                found.append(rank)
        return found

    def end(self, within: float) -> float:
        """Seconds until no rank is left; fails beyond `within`."""
        began = time.monotonic()
        while self.alive():
            assert time.monotonic() - began < within, f"ranks {self.alive()} still run: {self.log.read_text()}"
            time.sleep(0.02)
        return time.monotonic() - began

    def lines(self) -> list[str]:
        self.process.wait(20)
        return [line for line in self.log.read_text().splitlines() if line.startswith("llama_dist: ")]

    def close(self) -> None:
        for pid in [*self.pids.values(), self.process.pid]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()


@pytest.fixture
def start(tmp_path: Path):  # type: ignore[no-untyped-def]
    jobs: list[Job] = []

    def begin(mode: str, ranks: int = 2) -> Job:
        jobs.append(Job(mode, ranks, tmp_path))
        return jobs[-1]

    yield begin
    for job in jobs:
        job.close()


def test_an_orderly_end_says_nothing(start) -> None:  # type: ignore[no-untyped-def]
    job = start("end")
    assert job.process.wait(30) == 0
    assert job.lines() == []


@pytest.mark.parametrize("mode", ["loop", "idle", "sum"])
def test_a_killed_rank_ends_the_others_and_is_named(start, mode: str) -> None:  # type: ignore[no-untyped-def]
    job = start(mode, ranks=2 if mode == "idle" else 3)
    os.kill(job.pids[1], signal.SIGKILL)
    job.end(within=5)
    lines = job.lines()
    assert len(lines) == 1, lines
    assert re.search(rf"rank 1 \(host \S+, pid {job.pids[1]}\) died", lines[0])
    assert job.process.returncode == 1


def test_the_exception_of_one_rank_ends_all_with_its_message(start) -> None:  # type: ignore[no-untyped-def]
    job = start("raise", ranks=3)
    job.end(within=5)
    assert job.lines() == ["llama_dist: error: [rank 1] ValueError: the third wheel came off"]
    assert "Traceback" in job.log.read_text()


def test_ranks_that_differ_are_named(start) -> None:  # type: ignore[no-untyped-def]
    job = start("desync", ranks=3)
    job.end(within=5)
    (line,) = job.lines()
    assert "rank 1 differs from the others in the tokens sampled up to tick 9" in line


@pytest.mark.parametrize("mode", ["stop", "stop sum"])
def test_a_stopped_rank_is_named_after_the_timeout(start, mode: str) -> None:  # type: ignore[no-untyped-def]
    job = start(mode)
    os.kill(job.pids[1], signal.SIGSTOP)
    time.sleep(0.1)
    began = time.monotonic()
    while 0 in job.alive():
        assert time.monotonic() - began < 6 + 5
        time.sleep(0.05)
    os.kill(job.pids[1], signal.SIGCONT)
    job.end(within=5)
    (line,) = job.lines()
    assert f"pid {job.pids[1]}) does not answer" in line and "rank 1" in line


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_job_cleanly(start, number: signal.Signals) -> None:  # type: ignore[no-untyped-def]
    job = start("loop")
    if number == signal.SIGINT:
        os.killpg(job.process.pid, number)  # as Ctrl-C on a terminal does
    else:
        job.process.send_signal(number)
    job.end(within=5)
    lines = job.lines()
    assert len(lines) == 1 and re.search(r"stopped by SIG(INT|TERM)", lines[0]), lines
    assert 'fault_job.py", line' not in job.log.read_text(), "a worker's traceback"


def test_killing_torchrun_leaves_no_orphan(start) -> None:  # type: ignore[no-untyped-def]
    job = start("loop")
    job.process.kill()
    job.end(within=5)
