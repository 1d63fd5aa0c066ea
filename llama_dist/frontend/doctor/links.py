"""Pairs of ranks that cannot connect or are slow, and what the bad ones have in common. Pure functions."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from llama_dist.frontend.doctor.facts import Facts, Link, name_ranks
from llama_dist.frontend.doctor.findings import Finding
from llama_dist.frontend.numbers import show_time
from llama_dist.frontend.sizes import show_bytes

TIMES = 3.0  # worse than the good ones of its like: a slow pair
JITTER = 5e-4  # seconds of latency beyond that, which a busy host may take
MOST_LATENCY = 5e-3  # seconds, of any pair: a token takes two reductions a layer
LEAST_BANDWIDTH = 50e6  # bytes a second, of any pair: half of Gigabit Ethernet
MOST_LINES = 8

Edge = tuple[int, int]


@dataclass(frozen=True)
class Blame:
    """What bad pairs have in common: `host` (all its pairs with other hosts), `hosts` (all pairs between two), `rank`
    (all its pairs), or `pair`. `who` are the hosts or ranks.
    """

    kind: str
    who: tuple[str, ...]
    pairs: tuple[Edge, ...]


def blame(bad: Iterable[Edge], tested: Sequence[Edge], hosts: Mapping[int, str]) -> list[Blame]:
    """The widest descriptions that hold, each bad pair in one of them. A host or rank is blamed where it is bad with at
    least two others; where all are bad with all, none is to blame, and pairs are named.

    Of ranks 0 to 2 with bad pairs (0, 2) and (1, 2) it is rank 2.
    """
    marked, found = set(bad), list[Blame]()
    left = set(marked)

    def of_hosts(pair: Edge) -> tuple[str, ...]:
        return tuple(sorted({hosts[pair[0]], hosts[pair[1]]}))

    def ends(pair: Edge) -> list[tuple[str, ...]]:
        names = of_hosts(pair)
        return [(name,) for name in names] if len(names) == 2 else []

    def between(pair: Edge) -> list[tuple[str, ...]]:
        names = of_hosts(pair)
        return [names] if len(names) == 2 else []

    def ranks(pair: Edge) -> list[tuple[str, ...]]:
        return [(str(rank),) for rank in pair]

    levels: list[tuple[str, Callable[[Edge], list[tuple[str, ...]]]]] = [
        ("host", ends),
        ("hosts", between),
        ("rank", ranks),
    ]
    for kind, keys in levels:
        members: dict[tuple[str, ...], list[Edge]] = {}
        for pair in tested:
            for key in keys(pair):
                members.setdefault(key, []).append(pair)
        enough = 2 if kind != "hosts" else 1
        guilty = []
        for key, pairs in members.items():
            others = {k for pair in pairs for k in keys(pair)} - {key}
            if marked.issuperset(pairs) and (kind == "hosts" or len(others) >= enough):
                guilty.append(key)
        if kind != "hosts" and len(guilty) == len(members):
            continue
        for key in guilty:
            pairs = [pair for pair in members[key] if pair in left]
            if pairs:
                found.append(Blame(kind, key, tuple(pairs)))
                left.difference_update(pairs)
    return found + [Blame("pair", tuple(map(str, pair)), (pair,)) for pair in sorted(left)]


def _name(what: Blame, hosts: Mapping[int, str]) -> str:
    if what.kind == "host":
        return f"host {what.who[0]} and every other host"
    if what.kind == "hosts":
        return f"hosts {what.who[0]} and {what.who[1]}"
    if what.kind == "rank":
        return f"{name_ranks([int(what.who[0])], hosts)} and every other rank"
    return " and ".join(name_ranks([int(rank)], hosts) for rank in what.who)


def _ranks(what: Blame) -> tuple[int, ...]:
    return tuple(sorted({rank for pair in what.pairs for rank in pair}))


def _cut(found: list[Finding], what: str) -> list[Finding]:
    if len(found) <= MOST_LINES:
        return found
    rest = found[MOST_LINES:]
    ranks = tuple(sorted({rank for finding in rest for rank in finding.ranks}))
    return [*found[:MOST_LINES], Finding(rest[0].kind, ranks, f"and {len(rest)} more {what}; --json has them all")]


def unconnected(facts: Facts) -> list[Finding]:
    """Pairs of which one cannot connect to the other."""
    hosts, found = facts.hosts(), list[Finding]()
    reasons: dict[Edge, tuple[int, int, str]] = {}
    for (a, b), why in sorted(facts.unreached.items()):
        reasons.setdefault((min(a, b), max(a, b)), (a, b, why))
    there = sorted(facts.addresses)
    tested = [(a, b) for a in there for b in there if a < b]
    for what in blame(reasons, tested, hosts):
        a, b, why = reasons[what.pairs[0]]
        example = f"rank {a} cannot connect to rank {b} at {facts.addresses.get(b, '?')}: {why}"
        text = (
            f"no connection between {_name(what, hosts)} ({example}); open the hosts' ports to each other, and set "
            "GLOO_SOCKET_IFNAME to the interface between them"
        )
        found.append(Finding("unconnected", _ranks(what), text))
    return _cut(found, "pairs that cannot connect")


def median(links: Sequence[Link]) -> tuple[float, float]:
    """Of latency and of bandwidth."""
    return statistics.median(x.latency for x in links), statistics.median(x.bandwidth for x in links)


def good(links: Sequence[Link]) -> tuple[float, float]:
    """Latency and bandwidth that a quarter of the pairs reach.

    Of three hosts with a bad one two pairs of three are bad, and the median is theirs.
    """
    at = len(links) // 4
    return sorted(x.latency for x in links)[at], sorted((x.bandwidth for x in links), reverse=True)[at]


def is_slow(link: Link, latency: float, bandwidth: float) -> bool:
    """Whether a pair is far from what is good among its like, or too slow for any run."""
    most = min(MOST_LATENCY, TIMES * latency + JITTER)
    least = max(LEAST_BANDWIDTH, bandwidth / TIMES)
    return link.latency > most or link.bandwidth < least


def kinds(links: Sequence[Link], hosts: Mapping[int, str]) -> dict[bool, list[Link]]:
    """Pairs within a host (True) and between hosts (False); the two are not measured by each other."""
    found: dict[bool, list[Link]] = {}
    for link in links:
        found.setdefault(hosts[link.a] == hosts[link.b], []).append(link)
    return found


def slow_links(facts: Facts) -> list[Finding]:
    """Pairs that are much slower than others of their kind."""
    hosts, found = facts.hosts(), list[Finding]()
    for within, links in kinds(facts.links, hosts).items():
        latency, bandwidth = good(links)
        by_pair = {(link.a, link.b): link for link in links}
        bad = {pair for pair, link in by_pair.items() if is_slow(link, latency, bandwidth)}
        for what in blame(bad, list(by_pair), hosts):
            some = [by_pair[pair] for pair in what.pairs]
            worst = f"{show_time(max(x.latency for x in some))} one way, {_rate(min(x.bandwidth for x in some))}"
            others = (
                f", against {show_time(latency)} and {_rate(bandwidth)} of good ones" if len(bad) < len(links) else ""
            )
            remedy = (
                "see what runs on that host, and how the GPUs are connected"
                if within
                else "see cables, ports and switches, and whether GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME mean the "
                "fast network"
            )
            text = f"slow between {_name(what, hosts)}: {worst}{others}; {remedy}"
            found.append(Finding("slow link", _ranks(what), text))
    return _cut(found, "slow pairs")


def _rate(bandwidth: float) -> str:
    return f"{show_bytes(round(bandwidth))}/s"


def untimed(facts: Facts) -> Iterator[Finding]:
    """Pairs there was no time for."""
    n = len({rank for link in facts.links for rank in (link.a, link.b)})
    pairs = n * (n - 1) // 2
    left = pairs - len(facts.links)
    if left > 0:
        yield Finding("untimed", (), f"{left} of {pairs} pairs were not timed, for want of time", wrong=False)
