"""launch/multinode.sh on nodes with addresses and names of their own: network namespaces, gloo over veth."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from llama_dist.parallel.network import address_towards, interface_between, interface_of, is_loopback
from tests import netns
from tests.cluster_jobs import ROOT, Job, environment, errors, paced, texts
from tests.conftest import Saver

SCRIPT = str(ROOT / "launch" / "multinode.sh")
HEAD = netns.Nodes.address(0)


@pytest.fixture(scope="module")
def tiny(checkpoint: Saver) -> Path:
    return checkpoint("llama-gqa", "hf")


@pytest.fixture(scope="module")
def plain(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Two ranks, undisturbed."""
    return Job(tiny, tmp_path_factory.mktemp("plain")).plain(2)


@pytest.fixture
def nodes() -> Iterator[netns.Nodes]:
    """Three nodes that know no name but their own, and that as a loopback address."""
    netns.require()
    with netns.Nodes(3, hosts="loopback") as found:
        yield found


def log(job: Job, node: int) -> Path:
    return job.folder / f"log-{node}"


def launch(
    nodes: netns.Nodes, job: Job, ranks: dict[int, int], *words: str, step_seconds: float = 0.0
) -> list[subprocess.Popen[str]]:
    """The same line on every node of `ranks` (node: its number of ranks); logs start anew."""
    line = [SCRIPT, "--nnodes", str(len(ranks)), "--head", f"{HEAD}:29411", *words]
    env = environment(**paced(step_seconds))
    return [
        nodes.start(node, [*line, "--nproc_per_node", str(n), *job.flags], log(job, node), env, append=False)
        for node, n in ranks.items()
    ]


def running(job: Job, started: list[subprocess.Popen[str]]) -> None:
    job.wait_for_results(lambda: all(process.poll() is None for process in started))


def codes(started: list[subprocess.Popen[str]], within: float = 120) -> list[int]:
    return [process.wait(within) for process in started]


def logs(job: Job) -> str:
    return "\n".join(f"--- {path.name}\n{path.read_text()}" for path in sorted(job.folder.glob("log-*")))


@pytest.mark.spmd
@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_node_dies_and_the_job_is_finished(
    nodes: netns.Nodes, tiny: Path, tmp_path: Path, plain: list[str], victim: int
) -> None:
    """Node 0 keeps torchrun's stores and rank 0. After the one death both nodes go on, after the other a single one."""
    job, other = Job(tiny, tmp_path), 1 - victim
    running(job, launch(nodes, job, {0: 1, 1: 1}, step_seconds=0.02))
    nodes.kill(victim)
    nodes.ended(other, within=15)
    (said,) = errors(log(job, other).read_text())
    fate = "is gone, and the ranks' store with it" if victim == 0 else "does not answer"
    assert re.search(rf"\[rank {other}\] rank {victim} \(host node-{victim}, pid \d+\) {fate}", said), logs(job)
    ranks = {0: 1, 1: 1} if victim == 0 else {0: 2}
    assert codes(launch(nodes, job, ranks)) == [0] * len(ranks), logs(job)
    job.check_whole(plain)


@pytest.mark.spmd
@pytest.mark.slow
@pytest.mark.parametrize("numbered", [False, True])
def test_a_cut_cable_ends_both_sides(nodes: netns.Nodes, tiny: Path, tmp_path: Path, numbered: bool) -> None:
    """Each side says that the other does not answer, in time, though no connection is ever closed.

    Machines numbered by hand need torchrun's store no more once the ranks are up, so torchrun ends on both sides too.
    """
    job = Job(tiny, tmp_path, 8)
    started = []
    for node in (0, 1):
        words = ["--nnodes=2", *([f"--node_rank={node}"] if numbered else [])]
        started += launch(nodes, job, {node: 1}, *words, step_seconds=0.02)
    running(job, started)
    nodes.cut(1)
    for node in (0, 1):
        (nodes.ended if numbered else nodes.ranks_ended)(node, within=23)
        (said,) = errors(log(job, node).read_text())
        assert re.search(rf"rank {1 - node} \(host node-{1 - node}, pid \d+\) does not answer", said), logs(job)
    assert job.status()["state"] == "failed"


@pytest.mark.spmd
@pytest.mark.slow
def test_told_to_stop_and_finished_on_three_nodes(
    nodes: netns.Nodes, tiny: Path, tmp_path: Path, plain: list[str]
) -> None:
    """SIGTERM to one node's script drains the job on both; four ranks on three nodes, one of them the head, finish."""
    job = Job(tiny, tmp_path)
    started = []
    for node in (0, 1):
        started += launch(nodes, job, {node: 1}, "--nnodes=2", f"--node_rank={node}", step_seconds=0.02)
    running(job, started)
    nodes.signal(1, "multinode.sh", signal.SIGTERM)
    assert codes(started) == [75, 75], logs(job)
    assert job.status()["state"] == "preempted"
    assert codes(launch(nodes, job, {0: 1, 1: 1, 2: 2})) == [0, 0, 0], logs(job)
    assert job.texts() == texts(plain)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "--nnodes is '', must be a whole number from 1"),
        (["--nnodes", "two"], "--nnodes is 'two', must be a whole number from 1"),
        (["--nnodes"], "--nnodes needs a value"),
        (["--nnodes=2"], "--head is missing"),
        (["--nnodes=2", "--head=h:x", "--nproc-per-node=1"], "the port of --head is 'x'"),
        (["--nnodes=2", "--head=h", "--nproc_per_node=0"], "--nproc_per_node is '0'"),
        (["--nnodes=2", "--head=no.such.host.invalid", "--nproc_per_node=1"], "--head no.such.host.invalid: "),
        (["--nnodes=2", "--head=localhost", "--nproc_per_node=1"], "is 127.0.0.1 here, which the other machines"),
    ],
)
def test_the_script_refuses_in_one_line(words: list[str], says: str) -> None:
    done = subprocess.run([SCRIPT, *words], capture_output=True, text=True, env=environment(), timeout=60)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1), done.stderr
    assert done.stderr.startswith("multinode.sh: ") and says in done.stderr


def test_the_interface_towards_a_host() -> None:
    assert is_loopback("127.0.1.1") and is_loopback("::1") and not is_loopback("fe80::1%eth0")
    assert address_towards("localhost", 1) in ("127.0.0.1", "::1")
    assert interface_of("127.0.0.1") == "lo"
    assert interface_of("203.0.113.9") is None
    assert interface_between("127.0.0.1", ["127.0.0.1", "127.0.1.1"], 1) is None
    with pytest.raises(OSError):
        address_towards("no.such.host.invalid", 1)


@pytest.mark.spmd
def test_the_store_s_host_asks_what_the_others_are_reached_by(nodes: netns.Nodes, tmp_path: Path) -> None:
    code = (
        "from llama_dist.parallel.network import *; "
        f"print(interface_between('127.0.1.1', ['127.0.1.1', '{nodes.address(1)}'], 1),"
        f" address_towards('{HEAD}', 1), interface_of('{HEAD}'), address_towards('node-0', 1))"
    )
    nodes.start(0, [sys.executable, "-c", code], tmp_path / "log", environment()).wait(30)
    assert (tmp_path / "log").read_text().split() == ["cable0", HEAD, "cable0", "127.0.0.1"]


def test_nothing_is_left_of_the_nodes() -> None:
    netns.require()
    with netns.Nodes(1) as found:
        assert found.space(0) in os.listdir("/run/netns")
        space = found.space(0)
    assert space not in os.listdir("/run/netns") and not (Path("/etc/netns") / space).exists()
