"""The checkpoint and the output's folder: one shared, copies alike, or different ones. Pure functions."""

from __future__ import annotations

import statistics
from collections.abc import Iterator

from llama_dist.frontend.doctor.facts import Facts, Look, Reading, name_ranks
from llama_dist.frontend.doctor.findings import Finding
from llama_dist.frontend.numbers import show_share
from llama_dist.frontend.sizes import show_bytes

SLOWER = 3.0  # times than the others' median: a host that reads slowly
LEAST_SPEED = 20e6  # bytes a second of a disk or file server; below it a large checkpoint takes hours
ENOUGH = 16 * 2**20  # bytes; a time of fewer says little
COLD = 0.5  # the share in memory above which a speed tells nothing of the disk


def places(looks: dict[int, Look]) -> list[list[int]]:
    """The ranks of each place where the checkpoint lies. Ranks whose files agree in inode, size and times see one.

    No two copies do: the time of the last change to an inode cannot be set.
    """
    found: dict[tuple[object, ...], list[int]] = {}
    for rank in sorted(looks):
        found.setdefault(looks[rank].stamps, []).append(rank)
    return list(found.values())


def where_checkpoint(facts: Facts) -> str | None:
    """One line: shared, or copies. None: nobody looked, or they differ."""
    if not facts.looks or any(finding.wrong for finding in checkpoint(facts)):
        return None
    hosts, found = facts.hosts(), places(facts.looks)
    n_hosts = len({hosts[rank] for rank in facts.looks})
    first = next(iter(facts.looks.values()))
    what = f"{first.format}, {show_bytes(first.bytes)}"
    if len(found) == 1:
        shared = f"one folder that {n_hosts} hosts share" if n_hosts > 1 else "one folder"
        return f"{what}, {shared} ({first.mount})"
    parts = [f"{name_ranks(ranks, hosts)} ({facts.looks[ranks[0]].mount})" for ranks in found]
    return f"{what}, {len(found)} copies alike: {'; '.join(parts)}"


def checkpoint(facts: Facts) -> Iterator[Finding]:
    """Ranks whose checkpoint differs from that of most."""
    looks, hosts = facts.looks, facts.hosts()
    if not looks:
        return
    groups: dict[str, list[int]] = {}
    for rank in sorted(looks):
        groups.setdefault(str(sorted(looks[rank].digests.items())), []).append(rank)
    usual = max(groups.values(), key=len)
    for ranks in groups.values():
        if ranks is not usual:
            text = (
                f"{name_ranks(ranks, hosts)} see another checkpoint than the others: "
                f"{difference(looks[ranks[0]], looks[usual[0]])}; copy it again, or put it on a shared disk"
            )
            yield Finding("checkpoint", tuple(ranks), text)


def difference(one: Look, other: Look) -> str:
    """The first file in which two checkpoints differ, and how."""
    sizes = [{name: size for name, size, *_ in look.stamps} for look in (one, other)]
    for name in sorted(sizes[0].keys() | sizes[1].keys()):
        if name not in sizes[0]:
            return f"{name} is not there"
        if name not in sizes[1]:
            return f"{name} is there only"
        if sizes[0][name] != sizes[1][name]:
            return f"{name} has {sizes[0][name]} bytes there, not {sizes[1][name]}"
        if one.digests[name] != other.digests[name]:
            return f"{name} has other content there"
    return "nothing"


def output(facts: Facts) -> Iterator[Finding]:
    """The folder of results: who cannot see or write what rank 0 does."""
    hosts = facts.hosts()
    blind = [rank for rank, sight in facts.sights.items() if not sight.sees]
    heads = {replica[0] for replica in facts.replicas()}
    if blind:
        folder = all(facts.sights[rank].folder for rank in blind)
        what = "has one of that name, not the same" if folder else "has none of that name"
        needed = bool(heads.intersection(blind))
        remedy = (
            "every replica writes there: put it on a shared disk"
            if needed
            else f"rank 0 alone writes there, so start the job again with rank 0 on host {hosts[0]}"
        )
        text = f"the folder of {facts.output} is not shared: {name_ranks(blind, hosts)} {what}; {remedy}"
        yield Finding("output", tuple(blind), text, wrong=needed)
    barred = [r for r, sight in facts.sights.items() if r in heads and sight.sees and not sight.writes]
    if barred:
        text = f"{name_ranks(barred, hosts)} may not write into the folder of {facts.output}; see its owner and mode"
        yield Finding("output", tuple(barred), text)


def slow_reading(facts: Facts) -> Iterator[Finding]:
    """Hosts that read the checkpoint much more slowly than others, or too slowly for any use."""
    cold = {rank: reading for rank, reading in facts.readings.items() if _tells(reading)}
    if not cold:
        return
    hosts = facts.hosts()
    usual = statistics.median_high(reading.speed for reading in cold.values())
    for rank, reading in sorted(cold.items()):
        if reading.speed >= max(usual / SLOWER, LEAST_SPEED):
            continue
        others = "" if reading.speed >= usual / SLOWER else f", the others {show_bytes(round(usual))}/s"
        text = (
            f"host {hosts[rank]} reads the checkpoint at {show_bytes(round(reading.speed))}/s{others}; see its disk or "
            "its way to the file server, or copy the checkpoint to a local disk"
        )
        yield Finding("slow reading", (rank,), text)


def _tells(reading: Reading) -> bool:
    return reading.bytes >= ENOUGH and reading.cached is not None and reading.cached < COLD


def show_reading(reading: Reading) -> str:
    """`1.20 GB/s, nothing of it from memory`."""
    if reading.cached is None:
        source = "maybe from memory"
    elif reading.cached == 0:
        source = "nothing of it from memory"
    else:
        source = f"{show_share(reading.cached)} of it from memory"
    return f"{show_bytes(round(reading.speed))}/s ({source})"
