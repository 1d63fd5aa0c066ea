"""What one rank of `doctor` does by itself: connections, clocks, files, processes, bounds."""

from __future__ import annotations

import errno
import os
import socket
import time
from pathlib import Path

import pytest
from torch.distributed import HashStore  # type: ignore[attr-defined]

from llama_dist.errors import CheckpointError, ConfigError
from llama_dist.frontend.doctor import files
from llama_dist.frontend.doctor.facts import Sight
from llama_dist.frontend.doctor.files import checkpoint_files, look, mount_of, put, read, see
from llama_dist.frontend.doctor.here import attempt
from llama_dist.parallel.launch import Launch
from llama_dist.parallel.reach import await_port, clock_offset, connect_all, listen, own_address
from llama_dist.parallel.roll import Roll, state_in, state_of
from llama_dist.parallel.watch import Card, my_card
from tests.conftest import Saver


def test_work_that_fails_or_hangs_is_a_line() -> None:
    assert attempt(lambda: 5) == {"value": 5} == attempt(lambda: 5, 5.0)
    assert attempt(lambda: 1 // 0) == {"error": "ZeroDivisionError: integer division or modulo by zero"}
    assert attempt(lambda: time.sleep(60), 0.05, "asleep") == {"error": "no end of it in 0.05 s: asleep"}


def test_connections_that_work_are_refused_or_get_no_answer() -> None:
    port = listen("127.0.0.1")
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        targets = {0: ("127.0.0.1", port), 1: closed.getsockname()[:2], 2: ("no.such.host.invalid", 1)}
        found = connect_all(targets, 30.0)  # looking up a name may take a while
    assert list(found) == [1, 2] or list(found) == [2, 1]
    assert found[1] == os.strerror(errno.ECONNREFUSED) and found[2]
    await_port(("127.0.0.1", port), 1.0)
    with pytest.raises(OSError, match="refused"):
        await_port(targets[1], 0.3)


def test_a_clock_s_offset_is_within_its_bound() -> None:
    port = listen("127.0.0.1", lambda: time.time_ns() + 7_000_000_000)
    offset, error = clock_offset(("127.0.0.1", port), 5.0)
    assert abs(offset - 7.0) <= error + 1e-4
    back, error = clock_offset(("127.0.0.1", listen("127.0.0.1")), 5.0, lambda: time.time_ns() + 7_000_000_000)
    assert abs(back + 7.0) <= error + 1e-4


def test_the_address_is_gloo_s(monkeypatch: pytest.MonkeyPatch) -> None:
    launch = Launch("srun", 0, 2, 0, 1, "127.0.0.1", 1)
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    assert own_address(launch, ["127.0.0.1", None]) == "127.0.0.1" == own_address(launch, [None, None])
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    assert own_address(launch, ["10.1.2.3", "10.1.2.4"]) == "127.0.0.1"
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "nosuch0")
    with pytest.raises(OSError, match="no interface nosuch0"):
        own_address(launch, ["10.1.2.3", "10.1.2.4"])


def test_two_processes_of_one_rank_are_refused() -> None:
    store = HashStore()
    Roll(store, 1, 2).enter()
    with pytest.raises(ConfigError, match="two processes came as rank 1 of 2"):
        Roll(store, 1, 2).enter()


@pytest.mark.parametrize(
    ("letter", "flags", "state"),
    [("S", 0x400000, "running"), ("T", 0, "stopped"), ("D", 0, "blocked"), ("Z", 0, "gone"), ("R", 0x400004, "gone")],
)
def test_what_the_kernel_says_of_a_process(letter: str, flags: int, state: str) -> None:
    assert state_in(f"17 (a) name) {letter} 1 17 17 0 -1 {flags} 150 0 0") == state


def test_the_state_of_a_process() -> None:
    mine = my_card(0)
    assert state_of(mine, mine) == "running"
    assert state_of(Card(1, mine.host, 2**22 + 1, mine.space), mine) == "gone"
    assert state_of(Card(1, "b", mine.pid, "another boot/1"), mine) is None


def test_a_checkpoint_is_looked_at_and_read(checkpoint: Saver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = checkpoint("llama-gqa", "hf5")  # three files
    found = look(str(model))
    assert found.format == "safetensors" and len(found.stamps) == len(found.digests) >= 4
    weights = sorted(model.glob("*.safetensors"))
    assert found.bytes == sum(path.stat().st_size for path in weights)
    assert look(str(model)) == found
    for place in ((0, 1), (0, 3), (2, 3)):
        reading = read(str(model), place)
        assert reading.bytes == found.bytes and reading.seconds > 0
        assert reading.cached is None or 0 <= reading.cached <= 1
    monkeypatch.setattr(files, "MOST_BYTES", 5000)
    assert read(str(model), (1, 2)).bytes == 5000
    assert checkpoint_files(weights[0]) == [weights[0]]
    with pytest.raises(CheckpointError):
        look(str(tmp_path))


def test_the_file_beside_the_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "LOOK_SECONDS", 0.0)
    out = str(tmp_path / "o.jsonl")
    path, text = put(out)
    name = Path(path).name
    assert see(out, text, name) == Sight(True, True, True, mount_of(tmp_path))
    assert not see(out, "other", name).sees and see(out, "other", name).folder
    assert not see(str(tmp_path / "none" / "o.jsonl"), text, name).folder
    with pytest.raises(ConfigError, match="cannot write into the folder of --output_file"):
        put(str(tmp_path / "none" / "o.jsonl"))


def test_the_file_system_of_a_path() -> None:
    assert mount_of(Path("/proc/self")).startswith("proc")
    assert mount_of(Path("/")) != "unknown file system"
