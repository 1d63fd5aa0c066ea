"""A Slurm of the test's own: munged, slurmctld and a slurmd for each of two nodes, all on this machine.

The nodes are called 127.0.0.2 and 127.0.0.3, names that resolve everywhere. Every daemon runs as the user who runs the
tests, in the foreground, with all its files in one folder.
"""

from __future__ import annotations

import contextlib
import getpass
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cluster_jobs import paced
from tests.spmd import free_port

ROOT = Path(__file__).parent.parent
DAEMONS = ["munged", "slurmctld", "slurmd"]
SEARCH = f"{Path(sys.executable).parent}:{os.environ['PATH']}:/usr/sbin:/sbin"
NODES = ["127.0.0.2", "127.0.0.3"]
START_WITHIN = 60.0

# A requeued job waits for cred_expire seconds, and 5 is the least. Steps get GraceTime seconds between the first
# signal and the last when a job of the partition `urgent` takes their place.
CONFIG = """
ClusterName=tests
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool.%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
ProctrackType={proctrack}
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/builtin
SchedulerParameters=batch_sched_delay=0,sched_interval=1
SlurmdParameters=config_overrides
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
ReturnToService=2
OverTimeLimit=0
KillWait=5
GresTypes=gpu
NodeName=127.0.0.2 Port={ports[0]} CPUs=8 RealMemory=1000 Gres=gpu:2
NodeName=127.0.0.3 Port={ports[1]} CPUs=8 RealMemory=1000 Gres=gpu:2
PartitionName=main Nodes=ALL Default=YES MaxTime=60 PriorityTier=1 GraceTime=20
PartitionName=urgent Nodes=ALL MaxTime=60 PriorityTier=10
"""


def require() -> None:
    """Skip where there is no Slurm; launch/test.sh installs it where it can. An error when CI=true."""
    missing = [name for name in (*DAEMONS, "sbatch", "pkill") if shutil.which(name, path=SEARCH) is None]
    if missing:
        (pytest.fail if os.environ.get("CI") == "true" else pytest.skip)(f"no {', '.join(missing)} here")


def until(ready: Callable[[], bool], what: Callable[[], str], within: float) -> None:
    """Wait for something; fails with what there is instead after so many seconds."""
    deadline = time.monotonic() + within
    while not ready():
        assert time.monotonic() < deadline, f"not within {within:g} s: {what()}"
        time.sleep(0.1)


class Cluster:
    """Starts with the object, stops with `close`. `proctrack`: which processes of a step Slurm sends signals to."""

    def __init__(self, proctrack: str) -> None:
        # The path of munged's socket must be open to all and short, which pytest's folders are not.
        self.folder = Path(tempfile.mkdtemp(prefix="slurm-"))
        self.folder.chmod(0o755)
        ports = [free_port() for _ in range(3)]
        text = CONFIG.format(
            port=ports[0], ports=ports[1:], user=getpass.getuser(), folder=self.folder, proctrack=proctrack
        )
        (self.folder / "slurm.conf").write_text(text)
        for number in range(2):  # what passes for two GPUs
            (self.folder / f"gpu{number}").touch()
        (self.folder / "gres.conf").write_text(f"Name=gpu File={self.folder}/gpu[0-1]\n")
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        (self.folder / "state").mkdir()
        foreign = re.compile("SLURM_|RANK$|WORLD_SIZE$|MASTER_|OMP_|NPROC_")
        self.env = {k: v for k, v in os.environ.items() if not foreign.match(k)}
        self.env |= {"SLURM_CONF": f"{self.folder}/slurm.conf", "PATH": SEARCH, **paced(0.002)}
        self._daemons: list[subprocess.Popen[bytes]] = []
        try:
            self._start()
        except BaseException:
            self.close()
            raise

    def _start(self) -> None:
        f = self.folder
        files = {"key-file": "munge.key", "socket": "munge.socket", "pid-file": "munge.pid", "seed-file": "munge.seed"}
        self._daemon("munged", "--foreground", "--num-threads=10", *(f"--{k}={f / v}" for k, v in files.items()))
        until((f / "munge.socket").exists, self.logs, START_WITHIN)
        self._daemon("slurmctld", "-D", "-c")
        for node in NODES:
            self._daemon("slurmd", "-D", "-N", node)
        ready = " ".join(["idle"] * len(NODES))
        until(
            lambda: " ".join(self.try_call("sinfo", "-hNp", "main", "-o", "%T").split()) == ready,
            self.logs,
            START_WITHIN,
        )

    def _daemon(self, *command: str) -> None:
        with (self.folder / "daemons.log").open("a") as log:
            self._daemons.append(
                subprocess.Popen(command, env=self.env, stdout=log, stderr=log, stdin=subprocess.DEVNULL)
            )

    def logs(self) -> str:
        """What the daemons last said."""
        ends = [f"--- {p.name}\n" + "\n".join(p.read_text().splitlines()[-15:]) for p in self.folder.glob("*.log")]
        return "\n".join(ends)

    def close(self) -> None:
        """End the daemons and every process of a job, and remove the folder."""
        for daemon in reversed(self._daemons):
            daemon.terminate()
        for daemon in self._daemons:
            try:
                daemon.wait(5)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        mine = f"SLURM_CONF={self.folder}/slurm.conf\0".encode()
        for _ in range(3):  # one may start another while we look
            for process in Path("/proc").glob("[0-9]*"):
                with contextlib.suppress(OSError):
                    if mine in (process / "environ").read_bytes() + b"\0":
                        os.kill(int(process.name), signal.SIGKILL)
        shutil.rmtree(self.folder, ignore_errors=True)

    # ---- what a user does

    def call(self, *words: str, cwd: Path | None = None, env: dict[str, str] | None = None, within: float = 60) -> str:
        """Run one of Slurm's commands; what it printed."""
        done = subprocess.run(
            words, cwd=cwd, env={**self.env, **(env or {})}, capture_output=True, text=True, timeout=within
        )
        assert done.returncode == 0, f"{words}: {done.returncode}\n{done.stdout}{done.stderr}\n{self.logs()}"
        return done.stdout

    def try_call(self, *words: str) -> str:
        return subprocess.run(words, env=self.env, capture_output=True, text=True, timeout=60).stdout

    def show(self, job: str) -> dict[str, str]:
        """The fields of a job, of the first task where it is an array."""
        text = self.call("scontrol", "show", "--oneliner", "job", job).splitlines()[0]
        return dict(re.findall(r"(\w+)=(\S*)", text))

    def state(self, job: str) -> str:
        return self.show(job)["JobState"]

    def wait(self, job: str, *states: str, within: float = 90) -> None:
        """Wait until the job is in one of these states."""
        until(lambda: self.state(job) in states, lambda: f"job {job}: {self.show(job)}\n{self.logs()}", within)
