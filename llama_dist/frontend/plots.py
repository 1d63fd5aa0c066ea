"""The plots of a report as SVG to put into a page. Needs matplotlib, which the extra `report` installs."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator

from llama_dist.frontend.histogram import LogHistogram
from llama_dist.frontend.numbers import show_number
from llama_dist.frontend.series import Stretch
from llama_dist.frontend.tally import Tally

STRETCHES = 240  # points across a plot
BARS = 120
WIDTH = 9.0  # inches, of which the text's sizes are a measure; the page scales them together
BLUE, ORANGE, GREY = "#0b7285", "#e8590c", "#52606d"
STYLE: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#9aa5b1",
    "axes.labelcolor": GREY,
    "xtick.color": GREY,
    "ytick.color": GREY,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e4e7eb",
    "grid.linewidth": 0.8,
    "lines.linewidth": 1.4,
    "legend.frameon": False,
    "legend.labelcolor": GREY,
}
UNITS = ((172800.0, 86400.0, "days"), (7200.0, 3600.0, "hours"), (180.0, 60.0, "minutes"), (0.0, 1.0, "seconds"))


EMPTY = "<p>Nothing to show.</p>"


def draw_plots(tally: Tally) -> list[tuple[str, str, str]]:
    """(key, heading, HTML) of each plot."""
    course = tally.series.stretches(STRETCHES)
    throughput = {
        "generated tokens/s": [s.new_tokens for s in course],
        "prompt tokens/s": [s.prompt_tokens for s in course],
    }
    batch = {"running sequences": [s.running for s in course], "waiting sequences": [s.waiting for s in course]}
    kv = {"pages held, %": [100 * s.kv for s in course]}
    return [
        ("throughput", "Throughput", _over_time("throughput", course, throughput)),
        ("batch", "Batch size", _over_time("batch", course, batch)),
        ("kv", "KV cache", _over_time("kv", course, kv, top=100)),
        ("latency", "Latency", _latency(tally.latency)),
    ]


def _svg(name: str, figure: Figure) -> str:
    """The figure as an element of a page."""
    buffer = io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):  # text stays text: searchable, and shorter
        figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    text = buffer.getvalue()
    text = text[text.index("<svg") :]  # the XML and DOCTYPE lines have no place in a page
    text = re.sub(r' xmlns(:\w+)?="[^"]*"', "", text)  # nor namespaces, which a page's reader knows
    text = re.sub(r'<g id="[^"]*">', "<g>", text)  # names that the plots have in common
    return re.sub(r"'DejaVu Sans'[^;\"]*", "'DejaVu Sans', Verdana, Arial, sans-serif", text)


def _panels(count: int, height: float) -> tuple[Figure, list[Axes]]:
    """Axes under each other, each `height` inches high; margins in inches, alike in all figures, so that they align."""
    total = 0.5 + count * (height + 0.25)
    figure = Figure(figsize=(WIDTH, total))
    figure.subplots_adjust(0.9 / WIDTH, 0.5 / total, 1 - 0.15 / WIDTH, 1 - 0.25 / total, hspace=0.25 / height)
    panels = figure.subplots(count, 1, sharex=True, squeeze=False)[:, 0].tolist()
    for axes in panels:
        axes.yaxis.set_label_coords(-0.72 / WIDTH, 0.5)
        axes.yaxis.set_major_locator(MaxNLocator(nbins=5, steps=[1, 2, 5, 10], min_n_ticks=2))
        axes.yaxis.set_major_formatter(FuncFormatter(_tick))
    return figure, panels


def _tick(value: float, _: int | None) -> str:
    if abs(value) >= 1e6:
        return f"{value / 1e6:g}M"
    return f"{value / 1e3:g}k" if abs(value) >= 1e5 else f"{value:,g}"


def _over_time(name: str, course: Sequence[Stretch], lines: dict[str, list[float]], top: float | None = None) -> str:
    """A panel a line, because one may dwarf the other; `top`: where the scale ends, if not at the largest value."""
    if not course:
        return EMPTY
    size, unit = next((size, unit) for least, size, unit in UNITS if course[-1].end >= least)
    edges = [course[0].start / size, *(stretch.end / size for stretch in course)]
    with rc_context(STYLE):
        figure, panels = _panels(len(lines), 1.5)
        for axes, (label, values), color in zip(panels, lines.items(), (BLUE, ORANGE), strict=False):
            axes.stairs(values, edges, baseline=None, color=color, linewidth=1.4)
            axes.set_ylabel(label)
            axes.set_ylim(0, top if top is not None else 1.08 * max(values) or 1)
        panels[-1].set_xlim(0, edges[-1])
        panels[-1].set_xlabel(f"{unit} since the start")
        return _svg(name, figure)


def _latency(latency: LogHistogram) -> str:
    bars = latency.bars(min(BARS, 20 + latency.count))
    if not bars:
        return EMPTY
    least, most = bars[0][0], bars[-1][1]
    widths = [high - low for low, high, _ in bars]
    with rc_context(STYLE):
        figure, (axes,) = _panels(1, 2.0)
        axes.set_xscale("log")
        axes.bar([low for low, _, _ in bars], [count for _, _, count in bars], widths, align="edge", color=BLUE)
        for percent, dashes in ((50, "-"), (90, "--"), (99, ":")):
            at = latency.percentile(percent)
            axes.axvline(at, color=ORANGE, linestyle=dashes, label=f"p{percent}: {show_number(at)} s")
        axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=3, borderaxespad=0.1)
        spare = max(1.05, (4 * least / most) ** 0.5)  # at least a span that has several ticks
        axes.set_xlim(least / spare, most * spare)
        wide = most / least > 30
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if wide else (1, 1.5, 2, 3, 4, 5, 6, 8)))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
        axes.minorticks_off()
        axes.set_ylabel("requests")
        axes.yaxis.set_major_locator(MaxNLocator(nbins=5, steps=[1, 2, 5, 10], integer=True))
        axes.set_xlabel("seconds from hand-over to end (logarithmic scale)")
        return _svg("latency", figure)
