"""`launch/multinode.sh ... doctor` on nodes with addresses and names of their own: network namespaces."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import netns
from tests.cluster_jobs import ROOT, environment

pytestmark = [pytest.mark.spmd, pytest.mark.slow]
SCRIPT = str(ROOT / "launch" / "multinode.sh")


@pytest.fixture
def nodes() -> Iterator[netns.Nodes]:
    netns.require()
    with netns.Nodes(3, hosts="loopback") as found:
        yield found


def doctor(nodes: netns.Nodes, folder: Path) -> dict[str, Any]:
    """One rank a node, rank r on node r; rank 0's report. Something is wrong, so every node says 1."""
    line = [SCRIPT, "--nnodes=3", f"--head={nodes.address(0)}:29413", "--nproc_per_node=1"]
    started = [
        nodes.start(node, [*line, f"--node_rank={node}", "doctor", "--device=cpu", "--json"], folder / f"{node}", env)
        for node in range(3)
        for env in [environment()]
    ]
    codes = [process.wait(90) for process in started]
    logs = "\n".join((folder / f"{node}").read_text() for node in range(3))
    assert codes == [1, 1, 1], logs
    (report,) = [line for line in logs.splitlines() if line.startswith("{")]
    found: dict[str, Any] = json.loads(report)
    assert [rank["host"] for rank in found["ranks"]] == ["node-0", "node-1", "node-2"]
    return found


def texts(found: dict[str, Any], kind: str) -> list[str]:
    return [finding["text"] for finding in found["findings"] if finding["finding"] == kind]


def test_a_slow_link_is_named(nodes: netns.Nodes, tmp_path: Path) -> None:
    nodes.throttle(2, "40mbit")
    found = doctor(nodes, tmp_path)
    rates = {(pair["a"], pair["b"]): pair["bandwidth"] for pair in found["pairs"]}
    assert rates[0, 2] < 40e6 / 8 * 2.5 and rates[1, 2] < 40e6 / 8 * 2.5, rates  # one way of two is slow
    assert any("node-2" in text and text.startswith("slow between host") for text in texts(found, "slow link"))
    assert {clock["host"] for clock in found["clocks"]} == {"node-0", "node-1", "node-2"}
    assert not texts(found, "clock")


def test_hosts_that_cannot_connect_are_named(nodes: netns.Nodes, tmp_path: Path) -> None:
    """Each of them reaches the head, which is all that torchrun needs to start them."""
    nodes.part(1, 2)
    nodes.part(2, 1)
    found = doctor(nodes, tmp_path)
    (text,) = texts(found, "unconnected")
    assert text.startswith(
        "no connection between hosts node-1 and node-2 (rank 1 cannot connect to rank 2 at 10.77.0.3"
    )
    assert found["pairs"] == []
