"""A picture of the results. Needs matplotlib, which the extra `report` installs."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Canvas
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

from llama_dist.frontend.bench.figures import RATE, Figure
from llama_dist.frontend.bench.results import Contender, Results
from llama_dist.frontend.bench.scaling import Series
from llama_dist.frontend.bench.table import about_text, show_value, title
from llama_dist.frontend.numbers import show_short
from llama_dist.frontend.plots import BLUE, GREY, ORANGE, STYLE

COLORS = (BLUE, ORANGE, "#2f9e44", "#862e9c", "#c2255c", "#495057", "#f08c00", "#1864ab")
WIDTH, ROW, DPI = 10.0, 0.34, 150  # inches


def draw(results: Results, path: Path) -> None:
    """Write a PNG: rates as shares of their limits, where a step's time goes, and the series. Raises OSError."""
    rates = [figure for figure in results.figures if figure.unit == RATE and figure.share is not None]
    rows = [max(1.2, ROW * len(rates) + 0.9)] if rates else []
    rows += [max(1.3, ROW * len(results.profiles) + 1.2)] if results.profiles else []
    series = [one for one in results.series if len(one.points) > 1]
    n_lines = -(-len(series) // 2)
    heights = [*rows, *[2.9] * n_lines]
    if not heights:
        heights = [0.5]
    with rc_context(STYLE):
        canvas = Canvas(figsize=(WIDTH, sum(heights) + 1.1), dpi=DPI, layout="constrained")
        canvas.suptitle("\n".join(about_text(results.about)[:2]), fontsize=8.5, color=GREY)
        grid = canvas.add_gridspec(len(heights), 2, height_ratios=heights)
        at = 0
        if rates:
            shares(canvas.add_subplot(grid[at, :]), rates, results.contenders)
            at += 1
        if results.profiles:
            profile(canvas.add_subplot(grid[at, :]), results)
            at += 1
        for i, one in enumerate(series):
            growth(canvas.add_subplot(grid[at + i // 2, i % 2]), one)
        canvas.savefig(path, format="png")


def shares(axes: Axes, rates: Sequence[Figure], contenders: Sequence[Contender]) -> None:
    """A bar a rate, its limit being 100 %; the others' rates as marks."""
    values = [100 * (figure.share or 0.0) for figure in rates]
    axes.barh(range(len(rates)), values, color=BLUE, height=0.62)
    axes.set_yticks(range(len(rates)), [title(figure).removesuffix(f", {RATE}") for figure in rates])
    axes.invert_yaxis()
    axes.axvline(100, color=ORANGE, linewidth=1.2)
    ends = list(values)
    for color, marker, contender in zip(COLORS[1:], "osD^v", contenders, strict=False):
        marks = [
            (100 * statistics.median(theirs) / (figure.limit or 1.0), i)
            for i, figure in enumerate(rates)
            if (theirs := contender.values.get((figure.name, figure.size)))
        ]
        axes.plot(*zip(*marks, strict=True), marker, color=color, markersize=5, label=contender.name)
        ends = [max(end, *[x for x, i in marks if i == row], 0.0) for row, end in enumerate(ends)]
    for i, (figure, end) in enumerate(zip(rates, ends, strict=True)):
        limit = show_value(figure.limit or 0.0, figure.unit)
        axes.text(end + 1.5, i, f"{show_value(figure.median, figure.unit)} of {limit}", va="center", fontsize=8.5)
    axes.set_xlim(0, max(112.0, *(end * 1.25 for end in ends)))
    axes.grid(False, axis="y")
    axes.set_xlabel(f"{RATE}, % of the limit measured in the same run")
    if contenders:
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=4, fontsize=8.5, borderaxespad=0.2)


def profile(axes: Axes, results: Results) -> None:
    """Where the time of a decode step goes, a bar a batch."""
    batches = list(results.profiles)
    labels = list(dict.fromkeys(label for batch in batches for label in results.profiles[batch]))
    labels.sort(key=lambda label: -max(results.profiles[batch].get(label, 0.0) for batch in batches))
    left = [0.0] * len(batches)
    for color, label in zip((COLORS * len(labels))[: len(labels)], labels, strict=True):
        widths = [100 * results.profiles[batch].get(label, 0.0) for batch in batches]
        axes.barh(range(len(batches)), widths, left=left, color=color, height=0.62, label=label)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    axes.set_yticks(range(len(batches)), [f"batch {batch}" for batch in batches])
    axes.invert_yaxis()
    axes.grid(False, axis="y")
    axes.set_xlim(0, 100)
    axes.set_xlabel("% of a decode step")
    axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=4, fontsize=8.5, borderaxespad=0.2)


def growth(axes: Axes, series: Series) -> None:
    """The rate over the size, both logarithmic."""
    color = "#c92a2a" if series.steep else BLUE
    sizes, rates = [point.x for point in series.points], [point.rate for point in series.points]
    axes.loglog(sizes, rates, "o-", color=color, markersize=3.5)
    least, most = min(rates), max(rates)
    spare = max(1.25, (8 * least / most) ** 0.5)  # a flat line looks flat
    axes.set_ylim(least / spare, most * spare)
    axes.xaxis.set_major_locator(FixedLocator(sizes))
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if most / least < 100 else (1,)))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_minor_locator(NullLocator())
        axis.set_major_formatter(FuncFormatter(lambda value, _: show_short(value)))
    axes.set_xlabel(series.axis)
    axes.set_ylabel(series.unit)
    steep = "" if series.exponent is None else f": cost ~ work^{series.exponent:.2f}"
    axes.set_title(series.name + steep, fontsize=9, loc="left", color=color)
