"""The plots of a report as SVG to put into a page. Needs matplotlib, which the extra `report` installs."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, PercentFormatter

from llama_dist.frontend.histogram import LogHistogram
from llama_dist.frontend.numbers import show_number
from llama_dist.frontend.series import Stretch
from llama_dist.frontend.tally import Tally

STRETCHES = 240  # points across a plot
BARS = 60
WIDTH = 9.0
PROMPT, NEW, GREY = "#0b7285", "#e8590c", "#52606d"
STYLE = {
    "svg.fonttype": "none",  # text stays text: it can be searched and needs no glyphs in the file
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


def draw_plots(tally: Tally) -> list[tuple[str, str, str]]:
    """(key, heading, SVG) of each plot."""
    course = tally.series.stretches(STRETCHES)
    return [
        ("throughput", "Throughput", _svg("throughput", 2.7, lambda axes: _throughput(axes, course))),
        ("batch", "Batch size", _svg("batch", 2.7, lambda axes: _batch(axes, course))),
        ("kv", "KV cache", _svg("kv", 2.2, lambda axes: _kv(axes, course))),
        ("latency", "Latency", _svg("latency", 2.7, lambda axes: _latency(axes, tally.latency))),
    ]


def _svg(name: str, height: float, draw: Callable[[Axes], None]) -> str:
    """A figure of one plot, `height` inches to WIDTH."""
    with rc_context({**STYLE, "svg.hashsalt": name}):
        figure = Figure(figsize=(WIDTH, height))
        # Margins in inches, alike for all, so that the plots' time axes stand under each other.
        figure.subplots_adjust(0.8 / WIDTH, 0.5 / height, 1 - 0.1 / WIDTH, 1 - 0.3 / height)
        draw(figure.add_subplot())
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    text = buffer.getvalue()
    text = text[text.index("<svg") :]  # the XML and DOCTYPE lines have no place in a page
    text = re.sub(r' xmlns(:\w+)?="[^"]*"', "", text)  # nor namespaces, which a page's reader knows
    text = re.sub(r'<g id="[^"]*">', "<g>", text)  # names that the plots have in common
    return re.sub(r"'DejaVu Sans'[^;\"]*", "'DejaVu Sans', Verdana, Arial, sans-serif", text)


def _steps(axes: Axes, course: Sequence[Stretch], values: Sequence[float], label: str, color: str) -> None:
    size, _ = _unit(course)
    if not course:
        return
    edges = [course[0].start / size, *(stretch.end / size for stretch in course)]
    axes.stairs(values, edges, baseline=None, label=label, color=color, linewidth=1.4)


def _unit(course: Sequence[Stretch]) -> tuple[float, str]:
    span = course[-1].end if course else 0.0
    return next((size, name) for least, size, name in UNITS if span >= least)


def _over_time(axes: Axes, course: Sequence[Stretch], label: str, legend: bool = True) -> None:
    """What the plots over time have in common."""
    size, name = _unit(course)
    axes.set_xlabel(f"{name} since the start")
    axes.set_ylabel(label)
    axes.set_ylim(bottom=0)
    axes.set_xlim(0, course[-1].end / size if course else 1)
    if legend and course:
        axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2, borderaxespad=0)


def _plain() -> FuncFormatter:
    return FuncFormatter(lambda value, _: f"{value:,.0f}" if value == round(value) else f"{value:,g}")


def _throughput(axes: Axes, course: Sequence[Stretch]) -> None:
    _steps(axes, course, [s.prompt_tokens for s in course], "prompt", PROMPT)
    _steps(axes, course, [s.new_tokens for s in course], "generated", NEW)
    _over_time(axes, course, "tokens/s")
    axes.yaxis.set_major_formatter(_plain())


def _batch(axes: Axes, course: Sequence[Stretch]) -> None:
    _steps(axes, course, [s.running for s in course], "running", PROMPT)
    _steps(axes, course, [s.waiting for s in course], "waiting", NEW)
    _over_time(axes, course, "sequences")
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.yaxis.set_major_formatter(_plain())


def _kv(axes: Axes, course: Sequence[Stretch]) -> None:
    _steps(axes, course, [s.kv for s in course], "held", PROMPT)
    _over_time(axes, course, "pages held", legend=False)
    axes.set_ylim(0, 1.02)
    axes.yaxis.set_major_formatter(PercentFormatter(1, symbol=" %"))


def _latency(axes: Axes, values: LogHistogram) -> None:
    bars = values.bars(BARS)
    axes.set_xlabel("seconds from hand-over to end, logarithmic")
    axes.set_ylabel("requests")
    axes.set_xscale("log")
    if not bars:
        axes.set_xlim(0.1, 10)
        axes.set_yticks([])
        return
    axes.bar(
        [low for low, _, _ in bars],
        [count for _, _, count in bars],
        [high - low for low, high, _ in bars],
        align="edge",
        color=PROMPT,
        edgecolor="white",
        linewidth=0.4,
    )
    # At least half a decade, so that two or three of the ticks 1, 2, 5, 10 ... are in sight.
    spare = max(1.05, (6 * bars[0][0] / bars[-1][1]) ** 0.5)
    axes.set_xlim(bars[0][0] / spare, bars[-1][1] * spare)
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.yaxis.set_major_formatter(_plain())
    top = axes.get_ylim()[1]
    for i, percent in enumerate((50, 90, 99)):
        at = values.percentile(percent)
        axes.axvline(at, color=NEW, linewidth=1)
        axes.text(
            at, top * (1.14 - 0.07 * (i % 2)), f" p{percent} {show_number(at)} s", color=NEW, va="top", fontsize=9
        )
    axes.set_ylim(0, top * 1.16)
