"""A batch job under a real torchrun, with a fault planted in one of its processes at a tick.

`python -m tests.torchrun_job` is what torchrun starts: `python -m llama_dist`, with the fault of the environment.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.fault_ranks import Fault, plant

ROOT = Path(__file__).parent.parent
TORCHRUN = -1  # as the rank of a fault: torchrun itself


@dataclass(frozen=True)
class Ran:
    """torchrun's exit code, and what it and the ranks wrote to stderr."""

    code: int
    log: str

    @property
    def errors(self) -> list[str]:
        return [line for line in self.log.splitlines() if line.startswith("llama_dist: error:")]


def _alive(folder: Path) -> list[int]:
    found = []
    for path in folder.glob("pid.*"):
        try:
            state = Path(f"/proc/{path.read_text()}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            continue
        if state not in "ZT":  # a stopped one has had its fault and is killed below
            found.append(int(path.read_text()))
    return found


def torchrun(world: int, argv: Sequence[str], folder: Path, fault: Fault | None = None, within: float = 120) -> Ran:
    """`torchrun -m llama_dist ARGV` on `world` ranks until every rank has ended, torchrun killed or not."""
    for old in folder.glob("pid.*"):
        old.unlink()
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={world}"]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "FAULT_FOLDER": str(folder)}
    if fault is not None:
        env["FAULT"] = json.dumps([fault.kind, fault.rank, fault.tick])
    with (folder / "log").open("w") as log:
        job = subprocess.Popen([*command, "-m", "tests.torchrun_job", *argv], env=env, stderr=log, cwd=ROOT)
    began = time.monotonic()
    while job.poll() is None or _alive(folder):
        if time.monotonic() - began > within:
            job.kill()
            raise AssertionError(f"still running after {within} s:\n{(folder / 'log').read_text()}")
        time.sleep(0.02)
    for path in folder.glob("pid.*"):
        try:
            os.kill(int(path.read_text()), signal.SIGKILL)
        except ProcessLookupError:
            continue
    return Ran(job.returncode, (folder / "log").read_text())


def main() -> int:
    from llama_dist.__main__ import main as llama_dist
    from llama_dist.frontend.batch import desk

    desk.FLUSH_SECONDS = 0.0  # results on disk at every tick, so that each run has done something
    folder, rank = Path(os.environ["FAULT_FOLDER"]), int(os.environ["RANK"])
    (folder / f"pid.{rank}").write_text(str(os.getpid()))
    if "FAULT" in os.environ:
        kind, victim, tick = json.loads(os.environ["FAULT"])
        if rank == max(victim, 0):  # rank 0 takes torchrun's life
            plant(Fault("launcher" if victim == TORCHRUN else kind, rank, tick), folder / "mark")
    return llama_dist(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
