"""What is wrong, from the facts: one line each, naming who differs and what to do. Pure functions."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TypeVar

from llama_dist.frontend.doctor.facts import Facts, name_ranks, spans
from llama_dist.frontend.numbers import show_time

SLOW = 2.0  # times as long as the median of its like: a rank that computes slowly
CLOCK_MATTERS = 1.0  # seconds between two hosts' clocks
DOING: Mapping[str, str] = {
    "store": "meeting the others",
    "listen": "opening a port",
    "connect": "connecting to the others",
    "clock": "comparing clocks",
    "kernels": "compiling the C++ kernels",
    "compute": "computing a fixed product",
    "look": "looking at the checkpoint",
    "put": "writing into the output's folder",
    "output": "looking for the output's folder",
    "read": "reading the checkpoint",
    "plan": "waiting to exchange messages",
    "mesh": "exchanging messages",
    "absent": "looking what became of the others",
}
"""The steps after the ranks have met, and what each is about."""

K = TypeVar("K")


@dataclass(frozen=True)
class Finding:
    """`text` is one line. A finding that is not `wrong` is worth knowing, and all may be well."""

    kind: str
    ranks: tuple[int, ...]
    text: str
    wrong: bool = True


def missing(facts: Facts) -> Iterator[Finding]:
    """Ranks that never came to the roll."""
    never = [rank for rank, step in sorted(facts.absent.items()) if step == "here" and rank not in facts.late]
    if never:
        word = "rank" if len(never) == 1 else "ranks"
        yield Finding(
            "missing",
            tuple(never),
            f"{word} {spans(never)} of {facts.size} never came in {facts.seconds:g} s; heard of "
            f"{name_ranks(facts.who, facts.hosts())}. See the launcher's log of the missing, and whether they start "
            "with the same MASTER_ADDR and MASTER_PORT; where they start slowly, give a longer --timeout",
        )
    late = [rank for rank in facts.late if facts.absent[rank] == "here"]
    if late:
        yield Finding(
            "late",
            tuple(late),
            f"{name_ranks(late, facts.hosts())} came, but more than {facts.seconds:g} s after rank 0, when the others "
            "had begun without; give a longer --timeout",
        )


def silent(facts: Facts) -> Iterator[Finding]:
    """Ranks that came and then stopped answering."""
    for rank, step in sorted(facts.absent.items()):
        if step == "here":
            continue
        card, doing = facts.who[rank], DOING[step]
        who = f"rank {rank} (host {card.host}, pid {card.pid})"
        state = facts.states.get(rank)
        if rank in facts.late:
            text = f"{who} came late to the step of {doing}, and was left out after it: it is slow; see what runs there"
        elif state == "gone":
            text = f"{who} died while {doing}; its launcher's log says of what"
        elif state == "stopped":
            text = f"{who} is stopped, since it was {doing}; kill -CONT {card.pid} there wakes it"
        elif state == "blocked":
            text = f"{who} hangs in the kernel while {doing}: a disk, file server or device does not answer it"
        else:
            text = f"{who} came, and does not answer since it was {doing}; see what that process does there"
        yield Finding("silent", (rank,), text)


def failed(facts: Facts) -> Iterator[Finding]:
    """Steps that raised an error on some rank."""
    for step, by_rank in facts.errors.items():
        if step == "mesh" and any(facts.absent.get(rank) == "mesh" for rank in facts.absent):
            continue  # the others' exchanges broke off for the rank that went silent
        for text, ranks in _groups(by_rank).items():
            whole = f"{name_ranks(ranks, facts.hosts())}, {DOING[step]}: {text}"
            yield Finding("failed", tuple(ranks), whole, wrong=step != "kernels")  # torch's own serve as well
    if facts.interrupted is not None:
        yield Finding("interrupted", (), f"the examination did not come to its end: {facts.interrupted}")


def _groups(values: Mapping[int, K]) -> dict[K, list[int]]:
    """Ranks by value, in the order of their first ranks."""
    found: dict[K, list[int]] = {}
    for rank in sorted(values):
        found.setdefault(values[rank], []).append(rank)
    return found


def _odd(values: Mapping[int, str]) -> tuple[str, dict[str, list[int]]]:
    """The commonest value (ties: that of the lowest rank), and the ranks of each other one."""
    groups = _groups(values)
    usual = max(groups, key=lambda value: len(groups[value]))
    return usual, {value: ranks for value, ranks in groups.items() if value != usual}


def differing(facts: Facts) -> Iterator[Finding]:
    """Versions, devices and the size of the world, where ranks do not agree."""
    who, hosts = facts.who, facts.hosts()
    tables: dict[str, dict[int, str]] = {}
    for rank, card in who.items():
        for name, version in card.versions.items():
            tables.setdefault(name, {})[rank] = version
    remedies = [(name, table, "install the same everywhere", True) for name, table in tables.items()]
    remedies += [
        (
            "kernels",
            facts.kernels,
            "give all hosts the same compiler and kind of processor; --reproducible needs it",
            True,
        ),
        ("world size", {r: str(c.size) for r, c in who.items()}, "start all ranks of a job with one number", True),
        ("device", {r: c.device for r, c in who.items()}, "pass the same --device, or mend CUDA there", True),
        ("processor or GPU", {r: c.device_name for r, c in who.items()}, "the slowest sets the pace", False),
        ("cores", {r: str(c.cores) for r, c in who.items()}, "the slowest sets the pace", False),
    ]
    for what, table, remedy, wrong in remedies:
        if not table:
            continue
        usual, odd = _odd(table)
        for value, ranks in odd.items():
            have = "has" if len(ranks) == 1 else "have"
            text = f"{name_ranks(ranks, hosts)} {have} {what} {value}, the others {usual}; {remedy}"
            yield Finding("differs", tuple(ranks), text, wrong)
    for text, ranks in _groups({r: c.device_error for r, c in who.items() if c.device_error}).items():
        yield Finding("device", tuple(ranks), f"{name_ranks(ranks, hosts)}: {text}")
    shared = _groups({r: f"{hosts[r]} {c.device_id}" for r, c in who.items() if c.device_id})
    for ranks in (ranks for ranks in shared.values() if len(ranks) > 1):
        text = f"{name_ranks(ranks, hosts)} share one GPU; see CUDA_VISIBLE_DEVICES and the number of ranks a host"
        yield Finding("device", tuple(ranks), text)


def clocks(facts: Facts) -> Iterator[Finding]:
    """Hosts whose clock is away from rank 0's by more than matters."""
    hosts = facts.hosts()
    for host, (rank, offset, error) in host_clocks(facts).items():
        if abs(offset) - error > CLOCK_MATTERS:
            side = "ahead of" if offset > 0 else "behind"
            text = (
                f"the clock of host {host} is {show_time(abs(offset))} {side} that of host {hosts[0]} "
                f"(± {show_time(error)}); beyond {CLOCK_MATTERS:g} s logs and status files do not compare, and Slurm's "
                "end of a job comes at another time; run chrony or ntpd there"
            )
            yield Finding("clock", (rank,), text)


def host_clocks(facts: Facts) -> dict[str, tuple[int, float, float]]:
    """For each host the rank that told its time best, with seconds ahead of rank 0's host and the bound of error."""
    hosts, best = facts.hosts(), dict[str, tuple[int, float, float]]()
    for rank, (offset, error) in sorted(facts.clocks.items()):
        if hosts[rank] not in best or error < best[hosts[rank]][2]:
            best[hosts[rank]] = rank, offset, error
    return best


def slow_ranks(facts: Facts) -> Iterator[Finding]:
    """Ranks that take much longer for the same piece of work than those with the same device."""
    hosts = facts.hosts()
    kinds = _groups({rank: facts.who[rank].device_name for rank in facts.speeds})
    pieces: list[tuple[str, Callable[[int], float]]] = [
        ("product", lambda rank: facts.speeds[rank].product),
        ("copy in memory", lambda rank: facts.speeds[rank].copy),
    ]
    for ranks in kinds.values():
        for what, seconds in pieces:
            usual = statistics.median_low(map(seconds, ranks))
            slow = [rank for rank in ranks if seconds(rank) > SLOW * usual]
            for host in dict.fromkeys(hosts[rank] for rank in slow):
                some = [rank for rank in slow if hosts[rank] == host]
                worst = max(map(seconds, some))
                text = (
                    f"{name_ranks(some, hosts)} {'is' if len(some) == 1 else 'are'} slow: a fixed {what} takes "
                    f"{show_time(worst)}, {worst / usual:.1f} times the median; see what else runs there, its power "
                    "and heat limits, and OMP_NUM_THREADS"
                )
                yield Finding("slow", tuple(some), text)


def in_order(found: Iterable[Finding]) -> list[Finding]:
    """What is wrong first."""
    return sorted(found, key=lambda finding: not finding.wrong)
