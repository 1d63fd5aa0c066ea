"""The facts and findings for a reader, as tables and one line a finding, or as one JSON object."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from llama_dist.frontend.doctor.facts import Facts, name_ranks, spans
from llama_dist.frontend.doctor.findings import (
    DOING,
    Finding,
    clocks,
    differing,
    failed,
    host_clocks,
    in_order,
    missing,
    silent,
    slow_ranks,
)
from llama_dist.frontend.doctor.folders import checkpoint, output, show_reading, slow_reading, where_checkpoint
from llama_dist.frontend.doctor.here import show_speeds
from llama_dist.frontend.doctor.links import kinds, median, slow_links, unconnected, untimed
from llama_dist.frontend.numbers import show_number, show_time
from llama_dist.frontend.options import DoctorOptions
from llama_dist.frontend.sizes import show_bytes
from llama_dist.parallel.probe import SIZES

MOST_PAIRS = 28  # in the table: all of 8 ranks; of more, the slowest


def find(facts: Facts) -> list[Finding]:
    """All findings, those that are wrong first."""
    parts = (missing, silent, unconnected, failed, differing, clocks, slow_ranks)
    more = (checkpoint, output, slow_reading, slow_links, untimed)
    return in_order(finding for part in (*parts, *more) for finding in part(facts))


def report(facts: Facts, options: DoctorOptions) -> str:
    """What goes to stdout."""
    found = find(facts)
    if options.json:
        return json.dumps(as_json(facts, found), ensure_ascii=False) + "\n"
    sections = [_summary(facts), _ranks(facts), _files(facts, options), _pairs(facts), _reductions(facts), _list(found)]
    return "\n".join("\n".join(lines) + "\n" for lines in sections if lines)


def as_json(facts: Facts, found: Sequence[Finding]) -> dict[str, Any]:
    """The same as JSON values: times in seconds, sizes in bytes."""
    hosts = facts.hosts()

    def by_rank(values: dict[int, Any]) -> list[dict[str, Any]]:
        return [{"rank": rank, **asdict(value)} for rank, value in sorted(values.items())]

    findings = [
        {"finding": f.kind, "wrong": f.wrong, "ranks": f.ranks, "hosts": _hosts_of(f, hosts), "text": f.text}
        for f in found
    ]
    return {
        "ok": not any(f.wrong for f in found),
        "findings": findings,
        "size": facts.size,
        "launcher": facts.launcher,
        "ranks": [{**row, "name": hosts[row["rank"]]} for row in by_rank(facts.who)],
        "clocks": [{"host": h, "offset": offset, "error": e} for h, (_, offset, e) in host_clocks(facts).items()],
        "kernels": {str(rank): name for rank, name in sorted(facts.kernels.items())},
        "speeds": by_rank(facts.speeds),
        "checkpoint": where_checkpoint(facts),
        "readings": [{**row, "host": hosts[row["rank"]]} for row in by_rank(facts.readings)],
        "output": by_rank(facts.sights),
        "backend": facts.backend,
        "pairs": [asdict(link) for link in facts.links],
        "all_reduce": [
            {"ranks": list(ranks), "bytes": size, "seconds": seconds}
            for ranks, rows in _groups(facts)
            for size, seconds in rows
        ],
    }


def _hosts_of(finding: Finding, hosts: dict[int, str]) -> list[str]:
    return list(dict.fromkeys(hosts[rank] for rank in finding.ranks if rank in hosts))


def table(head: Sequence[str], rows: Sequence[Sequence[str]], left: int) -> list[str]:
    """Aligned columns, the first `left` of them to the left."""
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    return [
        "  ".join(
            cell.ljust(width) if i < left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in (head, *rows)
    ]


def _summary(facts: Facts) -> list[str]:
    hosts = facts.hosts()
    n_hosts = len(set(hosts.values()))
    lines = [
        f"{len(facts.who)} of {facts.size} ranks came, on {n_hosts} host{'' if n_hosts == 1 else 's'} "
        f"(launcher: {facts.launcher}); {facts.mp_size} hold a copy of the model"
    ]
    if facts.who:
        first = facts.who[min(facts.who)]
        versions = [f"{name} {version}" for name, version in first.versions.items()]
        kernels = [facts.kernels[rank] for rank in sorted(facts.kernels)[:1]]
        lines.append(f"rank {min(facts.who)} has {', '.join(versions + kernels)}")
    return lines


def _ranks(facts: Facts) -> list[str]:
    hosts, offsets = facts.hosts(), host_clocks(facts)
    rows = []
    for rank, card in sorted(facts.who.items()):
        clock, speed = offsets.get(hosts[rank]), facts.speeds.get(rank)
        product, copy = show_speeds(card.device, speed) if speed is not None else (None, None)
        rows.append(
            [
                str(rank),
                hosts[rank],
                card.device if card.device == "cpu" else card.device_name,
                facts.addresses.get(rank, "-"),
                f"{card.threads} of {card.cores}",
                "-" if clock is None else f"{'-' if clock[1] < 0 else '+'}{show_time(abs(clock[1]))}",
                "-" if product is None else f"{show_number(product / 1e9)} GFLOP/s",
                "-" if copy is None else f"{show_bytes(round(copy))}/s",
            ]
        )
    lines = table(["rank", "host", "device", "address", "threads", "clock", "product", "memory"], rows, 4)
    lost = {rank: DOING.get(step, "starting") for rank, step in facts.absent.items()}
    marks = ["", *(f"  lost while {lost[rank]}" if rank in lost else "" for rank in sorted(facts.who))]
    return [line + mark for line, mark in zip(lines, marks, strict=True)]


def _files(facts: Facts, options: DoctorOptions) -> list[str]:
    hosts, lines = facts.hosts(), []
    where = where_checkpoint(facts)
    if where is not None:
        lines.append(f"checkpoint {options.ckpt_dir}: {where}")
    for rank, reading in sorted(facts.readings.items()):
        lines.append(f"  read on host {hosts[rank]}: {show_reading(reading)}")
    if facts.sights and all(sight.sees for sight in facts.sights.values()):
        shared = len({hosts[rank] for rank in facts.sights}) > 1
        mount = facts.sights[min(facts.sights)].mount
        seen = "one folder that all hosts share" if shared else "there"
        lines.append(f"folder of the output {options.output_file}: {seen} ({mount})")
    return lines


def _pairs(facts: Facts) -> list[str]:
    if not facts.links:
        return []
    hosts = facts.hosts()
    rows = [
        [
            f"{name_ranks([link.a], hosts)} - {name_ranks([link.b], hosts)}",
            show_time(link.latency),
            f"{show_bytes(round(link.bandwidth))}/s",
        ]
        for link in sorted(facts.links, key=_slowness if len(facts.links) > MOST_PAIRS else lambda x: (x.a, x.b))
    ]
    lines = table([f"pairs over {facts.backend}", "latency", "bandwidth"], rows[:MOST_PAIRS], 1)
    if len(rows) > MOST_PAIRS:
        lines.append(f"and {len(rows) - MOST_PAIRS} faster ones")
    for within, links in kinds(facts.links, hosts).items():
        latency, bandwidth = median(links)
        where = "within a host" if within else "between hosts"
        lines.append(f"median of {len(links)} {where}: {show_time(latency)}, {show_bytes(round(bandwidth))}/s")
    return lines


def _slowness(link: Any) -> tuple[float, float]:
    return link.bandwidth, -link.latency


def _groups(facts: Facts) -> list[tuple[range, list[tuple[int, float]]]]:
    """For each copy of the model, its ranks and the times of its slowest rank."""
    found = []
    for ranks in facts.replicas():
        rows = [facts.reductions[rank] for rank in ranks if facts.reductions.get(rank)]
        if rows:
            found.append(
                (ranks, [(some[0][0], max(seconds for _, seconds in some)) for some in zip(*rows, strict=True)])
            )
    return found


def _reductions(facts: Facts) -> list[str]:
    """A row a size: of several copies of the model the slowest."""
    groups = _groups(facts)
    if not groups:
        return []
    rows = []
    for same in zip(*(rows for _, rows in groups), strict=True):
        size, seconds = max(same, key=lambda row: row[1])
        rows.append([_size(size), show_time(seconds), f"{show_bytes(round(size / seconds))}/s"])
    which = f"all-reduce of {facts.mp_size} ranks over {facts.backend}"
    lines = table([which, "latency", "bandwidth"], rows, 1)
    if len(rows) < len(SIZES):
        lines.append(f"{_size(SIZES[len(rows)])} and more were left out: they take too long")
    if len(groups) > 1:
        worst = max(groups, key=lambda group: group[1][-1][1])[0]
        lines.append(f"the slowest of {len(groups)} replicas; at the largest size ranks {spans(worst)}")
    return lines


def _size(size: int) -> str:
    return f"{size // 1024} KB" if size < 2**20 else f"{size // 2**20} MB"


def _list(found: Sequence[Finding]) -> list[str]:
    lines = [f"{'wrong' if f.wrong else 'note'}: {f.text}" for f in found]
    n = sum(f.wrong for f in found)
    return [*lines, "all is well" if n == 0 else f"{n} thing{'' if n == 1 else 's'} wrong"]
