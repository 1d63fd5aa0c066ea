"""Results as tables for people to read."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

from llama_dist.frontend.bench.figures import BYTES, RATE, SHARE, Figure, Limits
from llama_dist.frontend.bench.machine import About
from llama_dist.frontend.bench.results import Contender, Results
from llama_dist.frontend.bench.scaling import STEEPEST, Series
from llama_dist.frontend.numbers import show_number, show_share
from llama_dist.frontend.sizes import show_bytes

HEAD = ("", "median", "least .. most", "limit", "reached")


def show_value(value: float, unit: str) -> str:
    """With its unit, seconds below a tenth in milliseconds."""
    if unit == BYTES:
        return show_bytes(int(value))
    if unit == RATE:
        return show_number(value)
    if unit == SHARE:
        return f"{value:.2f}"
    return f"{show_number(value)} s" if value >= 0.1 else f"{show_number(1000 * value)} ms"


def title(figure: Figure) -> str:
    """What was measured, in words."""
    names = {
        "decode": f"decode, batch {figure.size}",
        "sampled": f"decode, batch {figure.size}, sampled",
        "prefill": f"prefill of {figure.size:,} tokens",
        "batch": "mixed batch of 64",
        "ready": "start to ready",
        "first token": "start to first token",
        "reductions": "reductions of a token",
        "host memory": "peak host memory a rank",
        "device memory": "peak device memory a rank",
        "decode of memory": f"decode, batch {figure.size}, of memory read in turn",
        "reproducible decode": f"decode, batch {figure.size}, reproducible / ordinary",
        "reproducible prefill": f"prefill of {figure.size:,} tokens, reproducible / ordinary",
    }
    return names[figure.name] + (f", {RATE}" if figure.unit == RATE else "")


def row(figure: Figure) -> tuple[str, ...]:
    """The cells of a figure's row."""
    least, most = min(figure.values), max(figure.values)
    spread = f"{show_value(least, figure.unit)} .. {show_value(most, figure.unit)}" if len(figure.values) > 1 else ""
    limit = "" if figure.limit is None else f"{show_value(figure.limit, figure.unit)} ({figure.bound})"
    share = "" if figure.share is None else show_share(figure.share)
    return title(figure), show_value(figure.median, figure.unit), spread, limit, share


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Columns under each other: the first to the left, the others to the right."""
    widths = [max(len(cells[i]) for cells in rows) for i in range(len(rows[0]))]
    lines = []
    for first, *others in rows:
        cells = [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        lines.append("  ".join([first.ljust(widths[0]), *cells]).rstrip())
    return lines


def figures_text(figures: Sequence[Figure]) -> list[str]:
    """The main table."""
    return aligned([HEAD, *(row(figure) for figure in figures)])


def limits_text(limits: Limits) -> list[str]:
    """What the limits were taken from."""
    lines = [
        f"memory: read at {limits.read / 1e9:.1f} GB/s ({limits.how['read']})",
        f"product: {show_number(limits.product / 1e9)} GFLOP/s ({limits.how['product']})",
    ]
    if limits.reduction is not None:
        lines.append(f"reduction: {show_number(1e6 * limits.reduction)} us each, one after another")
    return lines


def profile_text(profiles: Mapping[int, Mapping[str, float]]) -> list[str]:
    """Where the time of a decode step goes: a column for each batch."""
    most: dict[str, float] = {}
    for shares in profiles.values():
        for label, share in shares.items():
            most[label] = max(most.get(label, 0.0), share)
    rows = [("a decode step", *(f"batch {batch}" for batch in profiles))]
    rows += [
        (label, *(f"{100 * shares.get(label, 0):.1f} %" for shares in profiles.values()))
        for label in sorted(most, key=lambda label: -most[label])
    ]
    return aligned(rows)


def about_text(about: About) -> list[str]:
    """What a figure needs to stand by itself."""
    where = f"{about.device}, " if about.device != "cpu" else ""
    ranks = f"{about.ranks} rank{'s' if about.ranks > 1 else ''} x {about.threads} threads"
    hosts = f" on {about.hosts} hosts" if about.hosts > 1 else ""
    versions = f"torch {about.torch}, llama_dist {about.llama_dist}"
    return [
        f"{about.model}, {about.dtype}, {ranks}{hosts}",
        f"{where}{about.processor}, {about.cores} cores; {versions}; {about.date}",
        about.command,
    ]


def contenders_text(figures: Sequence[Figure], contenders: Sequence[Contender]) -> list[str]:
    """Medians of the others at the same work, and how many times better ours are."""
    rows = [("times better than", "llama_dist", *(contender.name for contender in contenders))]
    for figure in figures:
        cells = [title(figure), show_value(figure.median, figure.unit)]
        for contender in contenders:
            values, ratio = contender.values.get((figure.name, figure.size)), contender.ratio(figure)
            shown = show_value(statistics.median(values), figure.unit) if values else ""
            cells.append(f"{shown} ({ratio:.2f})" if ratio is not None else "")
        if any(cells[2:]):
            rows.append(tuple(cells))
    return [*aligned(rows), *(f"{contender.name}: {contender.about}" for contender in contenders)]


def series_text(series: Series) -> list[str]:
    """A series: sizes over rates, and how steep its cost rises."""
    if not series.points:
        return [f"{series.name} by {series.axis}: nothing; {series.note}"]
    lines = aligned(
        [
            (series.axis, *(f"{point.x:,.0f}" for point in series.points)),
            (f"{series.name}, {series.unit}", *(show_number(point.rate) for point in series.points)),
        ]
    )
    if series.exponent is not None:
        verdict = f"FASTER THAN ITS WORK (at most {STEEPEST})" if series.steep else "no faster than its work"
        lines.append(f"  its cost grows as the work to the {series.exponent:.2f}: {verdict}")
    if series.note:
        lines.append(f"  {series.note}")
    return lines


def text_of(results: Results) -> str:
    """Everything that is printed."""
    parts = [about_text(results.about), figures_text(results.figures), limits_text(results.limits)]
    if results.contenders:
        parts.append(contenders_text(results.figures, results.contenders))
    if results.profiles:
        parts.append(profile_text(results.profiles))
    parts += [series_text(series) for series in results.series]
    if results.left_out:
        parts.append([f"left out: {what}: {why}" for what, why in results.left_out])
    return "\n\n".join("\n".join(lines) for lines in parts) + "\n"
