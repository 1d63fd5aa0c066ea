"""What the ranks found, as rank 0 gathers it: plain data, from which findings and report are made."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Identity:
    """Where a rank runs and with what. `towards`: its own address on the way to the store.

    `versions` must be alike everywhere; `device_id` tells GPUs of one host apart.
    """

    host: str
    pid: int
    space: str
    size: int
    towards: str | None
    versions: Mapping[str, str]
    device: str
    device_name: str
    device_id: str | None = None
    device_error: str | None = None
    cores: int = 1
    threads: int = 1


@dataclass(frozen=True)
class Speed:
    """Seconds of a fixed product and of a fixed copy in memory."""

    product: float
    copy: float


@dataclass(frozen=True)
class Look:
    """A checkpoint as a rank sees it. `stamps`: of each file its name, size, inode, and times of change in ns.

    `digests`: of each file, of its size and some of its bytes.
    """

    format: str
    bytes: int
    mount: str
    stamps: tuple[tuple[str, int, int, int, int], ...]
    digests: Mapping[str, str]


@dataclass(frozen=True)
class Sight:
    """What a rank sees of the output's folder: `sees` the file that rank 0 put there, and may `write` there."""

    folder: bool
    sees: bool
    writes: bool
    mount: str


@dataclass(frozen=True)
class Reading:
    """Bytes read of the checkpoint in so many seconds. `cached`: the share that lay in memory before, None: unknown."""

    bytes: int
    seconds: float
    cached: float | None

    @property
    def speed(self) -> float:
        return self.bytes / self.seconds


@dataclass(frozen=True)
class Link:
    """A pair of ranks: seconds one way of a small message, bytes a second of a large one."""

    a: int
    b: int
    latency: float
    bandwidth: float


@dataclass
class Facts:
    """All of it, filled step by step. Everything by rank holds only ranks that came that far.

    `absent`: the step that a rank did not come to; `late`: absent ranks that came after all; `states`: what the absent
    ones do, where a rank of their host could look. `errors`: by step, what went wrong on which rank. `unreached`: who
    could not connect to whom, and why. `clocks`: seconds ahead of rank 0's, and by how much that may be wrong.
    `reductions`: by rank, bytes and seconds. `interrupted`: what ended the examination before its end.
    """

    size: int
    mp_size: int
    launcher: str
    seconds: float
    who: dict[int, Identity] = field(default_factory=dict)
    absent: dict[int, str] = field(default_factory=dict)
    late: list[int] = field(default_factory=list)
    states: dict[int, str] = field(default_factory=dict)
    errors: dict[str, dict[int, str]] = field(default_factory=dict)
    addresses: dict[int, str] = field(default_factory=dict)
    unreached: dict[tuple[int, int], str] = field(default_factory=dict)
    clocks: dict[int, tuple[float, float]] = field(default_factory=dict)
    kernels: dict[int, str] = field(default_factory=dict)
    speeds: dict[int, Speed] = field(default_factory=dict)
    looks: dict[int, Look] = field(default_factory=dict)
    output: str | None = None
    sights: dict[int, Sight] = field(default_factory=dict)
    readings: dict[int, Reading] = field(default_factory=dict)
    backend: str | None = None
    links: list[Link] = field(default_factory=list)
    reductions: dict[int, list[tuple[int, float]]] = field(default_factory=dict)
    interrupted: str | None = None

    def hosts(self) -> dict[int, str]:
        """The host of each rank that came, by a name that no other host has."""
        boots: dict[str, set[str]] = {}
        for card in self.who.values():
            boots.setdefault(card.host, set()).add(card.space.partition("/")[0])
        alike = {host for host, found in boots.items() if len(found) > 1}
        return {
            rank: f"{card.host} {card.towards or card.space[:8]}" if card.host in alike else card.host
            for rank, card in self.who.items()
        }

    def replicas(self) -> list[range]:
        """The ranks of each copy of the model."""
        return [range(first, first + self.mp_size) for first in range(0, self.size, self.mp_size)]


def spans(ranks: Iterable[int]) -> str:
    """0, 1, 2, 5 is `0-2, 5`."""
    runs: list[list[int]] = []
    for rank in sorted(ranks):
        if runs and rank == runs[-1][1] + 1:
            runs[-1][1] = rank
        else:
            runs.append([rank, rank])
    return ", ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


def name_ranks(ranks: Iterable[int], hosts: Mapping[int, str]) -> str:
    """`rank 2 (host a)`, or `ranks 0-3 (host a), rank 4 (host b)`; a rank that never came has no host."""
    by_host: dict[str, list[int]] = {}
    for rank in sorted(ranks):
        by_host.setdefault(hosts.get(rank, ""), []).append(rank)
    parts = []
    for host, some in by_host.items():
        parts.append(f"rank{'s' if len(some) > 1 else ''} {spans(some)}" + (f" (host {host})" if host else ""))
    return ", ".join(parts)
