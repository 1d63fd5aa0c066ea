"""What a job came to: the rows of its last table, as text here and as a page in the report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from llama_dist.frontend.histogram import ERROR, LogHistogram
from llama_dist.frontend.numbers import show_duration, show_number, show_share
from llama_dist.frontend.tally import Tally

PERCENTS = (10, 50, 90, 99)


@dataclass(frozen=True)
class Summary:
    """Rows of (name, value), and of (name, value a column) under `columns`."""

    rows: tuple[tuple[str, str], ...]
    columns: tuple[str, ...]
    spreads: tuple[tuple[str, tuple[str, ...]], ...]
    note: str

    @property
    def text(self) -> str:
        """The table for a terminal, lines without a newline at the end."""
        width = max(len(name) for name, _ in (*self.rows, *self.spreads))
        cells = [(name.ljust(width), *values) for name, values in (("", self.columns), *self.spreads)]
        widths = [max(len(row[i]) for row in cells) for i in range(len(self.columns) + 1)]
        lines = [f"{name.ljust(width)}  {value}" for name, value in self.rows]
        lines += ["  ".join(cell.rjust(w) for cell, w in zip(row, widths, strict=True)) for row in cells]
        return "\n".join([*lines, f"({self.note})"])


def summarize(
    tally: Tally,
    state: str,
    message: str | None,
    total: int | None,
    before: int,
    wall: float,
    fingerprint: str | None = None,
) -> Summary:
    """The table of a job of `total` requests, `before` of them answered by earlier runs, after `wall` seconds.

    `fingerprint`: what each result of a reproducible job carries.
    """
    stats, overall = tally.stats, tally.overall
    good = tally.done - tally.failed
    seen = stats.prompt_tokens + stats.cached_tokens
    counts = [f"{good:,} done", f"{tally.failed:,} failed"]
    counts += [f"{before:,} done before"] if before else []
    counts += [f"{max(0, total - before - tally.done):,} left"] if total is not None else []
    rows = [
        ("state", state if message is None else f"{state}: {message}"),
        ("requests", ", ".join(counts)),
        ("wall time", f"{show_duration(wall)} ({_per(tally.done, wall)} requests/s)"),
        ("prompt tokens", f"{stats.prompt_tokens:,} computed ({_per(stats.prompt_tokens, wall)}/s)"),
        ("new tokens", f"{stats.new_tokens:,} ({_per(stats.new_tokens, wall)}/s)"),
        (
            "prefix cache",
            f"{stats.cached_tokens:,} prompt tokens found ({show_share(_ratio(stats.cached_tokens, seen))})",
        ),
        (
            "mean request",
            f"{show_number(_ratio(tally.prompt_tokens, good))} prompt and "
            f"{show_number(_ratio(tally.new_tokens, good))} new tokens",
        ),
        ("batch", f"mean {show_number(overall.running)}, largest {tally.busiest:,} sequences, {stats.ticks:,} ticks"),
        ("KV cache", f"mean {show_share(overall.kv)}, fullest {show_share(tally.fullest)}"),
        ("preemptions", f"{stats.preemptions:,}"),
    ]
    rows += [("system fingerprint", fingerprint)] if fingerprint is not None else []
    return Summary(
        tuple(rows),
        ("min", *(f"p{percent}" for percent in PERCENTS), "max"),
        (
            ("latency, s", _spread(tally.latency)),
            ("new tokens/s of a request", _spread(tally.token_rate)),
        ),
        f"percentiles are within {100 * ERROR:.0f} % of the exact ones; failed requests are not among them",
    )


def _spread(values: LogHistogram) -> tuple[str, ...]:
    if values.count == 0:
        return ("-",) * (len(PERCENTS) + 2)
    found: Sequence[float] = [values.least, *(values.percentile(p) for p in PERCENTS), values.most]
    return tuple(show_number(value) for value in found)


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


def _per(count: float, seconds: float) -> str:
    return show_number(_ratio(count, seconds))
