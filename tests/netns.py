"""Nodes of a cluster on one machine: network namespaces with addresses and host names of their own, on one bridge.

Needs root and Debian's iproute2. Processes of different nodes share nothing but files and kernel; a node's death is the
kill of all its processes, a broken cable its link set down.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

_numbers = itertools.count()


def require() -> None:
    """Skip where no namespaces can be made; with CI=true only for want of root, since iproute2 can be installed."""
    if os.geteuid() != 0:
        pytest.skip("network namespaces need root")
    if shutil.which("ip") is None or shutil.which("unshare") is None:
        if os.environ.get("CI") == "true":
            pytest.fail("network namespaces need ip and unshare: apt-get install iproute2 util-linux")
        pytest.skip("network namespaces need ip and unshare (Debian: iproute2, util-linux)")
    probe = f"llama-probe-{os.getpid()}"
    if subprocess.run(["ip", "netns", "add", probe], capture_output=True).returncode:
        pytest.skip("this kernel or container makes no network namespaces")
    subprocess.run(["ip", "netns", "del", probe], check=True)


def _ip(*words: str) -> None:
    done = subprocess.run(["ip", *words], capture_output=True, text=True)
    assert done.returncode == 0, f"ip {' '.join(words)}: {done.stderr}"


class Nodes:
    """`count` nodes, node i at 10.77.0.(i + 1) and called PREFIX-i. Use as a context: all is taken down at the end.

    `hosts` 'names': every node knows the others' names. 'loopback': each knows its own name only, as 127.0.1.1, which
    is how Debian installs a machine. `domains`: with 'names', each has the names PREFIX-i.DOMAIN too.
    """

    def __init__(self, count: int, hosts: str = "names", prefix: str = "node", domains: Sequence[str] = ()) -> None:
        self.count, self._hosts, self._prefix, self._domains = count, hosts, prefix, domains
        self._tag = f"llama-{os.getpid()}-{next(_numbers)}"
        self._folders: list[Path] = []
        self.started: list[subprocess.Popen[str]] = []

    def space(self, node: int) -> str:
        return f"{self._tag}-{node}"

    def name(self, node: int) -> str:
        return f"{self._prefix}-{node}"

    @staticmethod
    def address(node: int) -> str:
        return f"10.77.0.{node + 1}"

    def __enter__(self) -> Nodes:
        try:
            self._set_up()
        except BaseException:
            self.__exit__()
            raise
        return self

    def _set_up(self) -> None:
        hub = f"{self._tag}-hub"
        _ip("netns", "add", hub)  # the bridge is in a namespace too: the machine's own network stays as it is
        _ip("-n", hub, "link", "add", "bridge", "type", "bridge")
        _ip("-n", hub, "link", "set", "bridge", "up")
        for node in range(self.count):
            space = self.space(node)
            _ip("netns", "add", space)
            _ip("-n", hub, "link", "add", f"port{node}", "type", "veth", "peer", "name", "cable0", "netns", space)
            _ip("-n", hub, "link", "set", f"port{node}", "master", "bridge", "up")
            _ip("-n", space, "addr", "add", f"{self.address(node)}/24", "dev", "cable0")
            _ip("-n", space, "link", "set", "cable0", "up")
            _ip("-n", space, "link", "set", "lo", "up")
            folder = Path("/etc/netns") / space  # `ip netns exec` puts these files over those of /etc
            folder.mkdir(parents=True)
            self._folders.append(folder)
            lines = ["127.0.0.1 localhost"]
            if self._hosts == "names":
                for i in range(self.count):
                    names = [self.name(i), *(f"{self.name(i)}.{domain}" for domain in self._domains)]
                    lines.append(f"{self.address(i)} {' '.join(names)}")
            else:
                lines.append(f"127.0.1.1 {self.name(node)}")
            (folder / "hosts").write_text("\n".join(lines) + "\n")
            (folder / "resolv.conf").write_text("")

    def __exit__(self, *_: object) -> None:
        for node in range(self.count):
            self.kill(node)
        for process in self.started:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(5)
        for space in [*(self.space(i) for i in range(self.count)), f"{self._tag}-hub"]:
            subprocess.run(["ip", "netns", "del", space], capture_output=True)
        for folder in self._folders:
            shutil.rmtree(folder, ignore_errors=True)
        with contextlib.suppress(OSError):
            Path("/etc/netns").rmdir()

    def start(
        self, node: int, command: Sequence[str], log: Path, env: Mapping[str, str], append: bool = True
    ) -> subprocess.Popen[str]:
        """A command on a node; what it prints goes to `log`."""
        own = ["--uts", "--pid", "--fork", "--mount-proc", "--kill-child"]  # or ranks would watch each other's pids
        named = ["unshare", *own, "sh", "-c", f'hostname {self.name(node)}; exec "$@"', "sh", *command]
        with log.open("a" if append else "w") as out:
            process = subprocess.Popen(
                ["ip", "netns", "exec", self.space(node), *named],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                env=dict(env),
                text=True,
                start_new_session=True,
            )
        self.started.append(process)
        return process

    def pids(self, node: int) -> list[int]:
        """Every process on the node."""
        done = subprocess.run(["ip", "netns", "pids", self.space(node)], capture_output=True, text=True)
        return [int(pid) for pid in done.stdout.split()]

    def kill(self, node: int) -> None:
        """kill -9 of everything on the node, also of what starts meanwhile."""
        for _ in range(50):
            pids = self.pids(node)
            if not pids:
                return
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.02)

    def _named(self, node: int, word: str) -> list[int]:
        """Processes of the node that have `word` among the first of their command."""
        found = []
        for pid in self.pids(node):
            with contextlib.suppress(OSError):
                words = Path(f"/proc/{pid}/cmdline").read_text().split("\0")[:4]
                if any(w == word or w.endswith(f"/{word}") for w in words):
                    found.append(pid)
        return found

    def signal(self, node: int, word: str, number: signal.Signals) -> None:
        for pid in self._named(node, word):
            os.kill(pid, number)

    def ranks_ended(self, node: int, within: float) -> None:
        """Until no rank runs on the node; its torchrun may. Fails beyond `within` seconds."""
        began = time.monotonic()
        while set(self._named(node, "llama_dist")) - set(self._named(node, "torch.distributed.run")):
            assert time.monotonic() - began < within, f"ranks of {self.name(node)} still run after {within} s"
            time.sleep(0.05)

    def cut(self, node: int) -> None:
        """Pull the node's cable. Its own address stays, packets go nowhere."""
        _ip("-n", f"{self._tag}-hub", "link", "set", f"port{node}", "down")

    def throttle(self, node: int, rate: str) -> None:
        """What the node sends goes at `rate`, such as 40mbit. Skips where this kernel cannot do that."""
        shape = ["qdisc", "add", "dev", "cable0", "root", "tbf", "rate", rate, "burst", "16k", "latency", "100ms"]
        if subprocess.run(["tc", "-n", self.space(node), *shape], capture_output=True).returncode:
            pytest.skip("this kernel throttles no links (tc tbf)")

    def part(self, node: int, other: int) -> None:
        """Packets of the node for the other one are dropped; both reach everybody else."""
        _ip("-n", self.space(node), "route", "add", "blackhole", f"{self.address(other)}/32")

    def ended(self, node: int, within: float) -> float:
        """Seconds until no process of the node is left; fails beyond `within`."""
        began = time.monotonic()
        while self.pids(node):
            assert time.monotonic() - began < within, f"{self.name(node)} still runs after {within} s"
            time.sleep(0.05)
        return time.monotonic() - began
