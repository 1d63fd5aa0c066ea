"""torchrun's --max-restarts: on one node the ranks meet again and finish the job; on several it is refused."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from llama_dist.errors import ConfigError
from llama_dist.parallel.launch import check_launch, read_launch
from tests.cluster_jobs import Job, environment, errors, paced
from tests.conftest import Saver
from tests.spmd import free_port

TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]


@pytest.fixture(scope="module")
def tiny(checkpoint: Saver) -> Path:
    return checkpoint("llama-gqa", "hf")


@pytest.fixture(scope="module")
def plain(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return Job(tiny, tmp_path_factory.mktemp("plain")).plain(2)


def ranks(parent: int) -> dict[int, tuple[int, int]]:
    """Pid and attempt of each rank that a torchrun has running."""
    found = {}
    for pid in Path(f"/proc/{parent}/task/{parent}/children").read_text().split():
        with contextlib.suppress(OSError):
            pairs = Path(f"/proc/{pid}/environ").read_text().split("\0")
            env = dict(pair.split("=", 1) for pair in pairs if "=" in pair)
            if "RANK" in env:
                found[int(env["RANK"])] = int(pid), int(env["TORCHELASTIC_RESTART_COUNT"])
    return found


@pytest.mark.spmd
@pytest.mark.slow
def test_killed_ranks_are_started_again_and_finish(tiny: Path, tmp_path: Path, plain: list[str]) -> None:
    """Rank 1 dies in the first attempt and rank 0, with the output's lock, in the second; the third finishes."""
    job = Job(tiny, tmp_path)
    log = tmp_path / "log"
    with log.open("w") as out:
        command = [*TORCHRUN, "--standalone", "--nproc_per_node=2", "--max-restarts=2", "-m", "llama_dist", *job.flags]
        process = subprocess.Popen(command, env=environment(**paced(0.01)), stdout=out, stderr=out)
    try:
        before = 0
        for attempt, victim in enumerate((1, 0)):
            until = time.monotonic() + 60
            while not (job.output.exists() and job.output.read_bytes().count(b"\n") > before):
                assert process.poll() is None and time.monotonic() < until, log.read_text()
                time.sleep(0.02)
            pid, count = ranks(process.pid)[victim]
            assert count == attempt
            os.kill(pid, signal.SIGKILL)
            while any(count == attempt for _, count in ranks(process.pid).values()):  # the other may write still
                assert time.monotonic() < until, log.read_text()
                time.sleep(0.02)
            before = job.output.read_bytes().count(b"\n")
        assert process.wait(90) == 0, log.read_text()
    finally:
        process.kill()
    job.check_whole(plain)
    said = errors(log.read_text())
    assert len(said) == 2 and "rank 1 (" in said[0] and "rank 0 (" in said[1], said
    assert not job.output.with_name("out.jsonl.lock").exists()


@pytest.mark.spmd
@pytest.mark.slow
def test_several_nodes_refuse_restarts_in_one_line(tiny: Path, tmp_path: Path) -> None:
    """Two agents, as two nodes would start them. torchrun tries each refused rank again; the line is said once."""
    job = Job(tiny, tmp_path)
    meet = ["--nnodes=2", "--nproc_per_node=1", "--master-addr=127.0.0.1", f"--master-port={free_port()}"]
    agents = []
    for node in (0, 1):
        words = [*TORCHRUN, *meet, f"--node-rank={node}", "--max-restarts=1", "-m", "llama_dist", *job.flags]
        agents.append(
            subprocess.Popen(words, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        )
    try:
        logs = [agent.communicate(timeout=60)[1] for agent in agents]
    finally:
        for agent in agents:
            agent.kill()
    assert [agent.returncode for agent in agents] == [1, 1]
    (said,) = errors("".join(logs))
    assert "--max-restarts 1 works on one node only" in said and "`batch` goes on where it stopped" in said
    assert not job.output.exists()


def test_restarts_are_refused_by_what_torchrun_sets() -> None:
    env = {"RANK": "1", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "TORCHELASTIC_MAX_RESTARTS": "3"}
    check_launch(read_launch({**env, "LOCAL_WORLD_SIZE": "4"}))
    check_launch(read_launch({**env, "LOCAL_WORLD_SIZE": "2", "TORCHELASTIC_MAX_RESTARTS": "0"}))
    with pytest.raises(ConfigError, match="--max-restarts 3 works on one node only"):
        check_launch(read_launch({**env, "LOCAL_WORLD_SIZE": "2"}))
