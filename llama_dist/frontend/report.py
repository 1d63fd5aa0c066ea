"""The report of a job: one HTML page with the summary and the plots in it, and nothing fetched from elsewhere."""

from __future__ import annotations

import html
import importlib.util
from pathlib import Path

from llama_dist.errors import ConfigError
from llama_dist.frontend.status import replace_file
from llama_dist.frontend.summary import Summary
from llama_dist.frontend.tally import Tally

STYLE = """
:root { color-scheme: light; }
body { margin: 2.5rem auto; max-width: 60rem; padding: 0 1.5rem; background: #fff; color: #1f2933;
       font: 15px/1.5 system-ui, -apple-system, "Segoe UI", "Liberation Sans", Arial, sans-serif; }
h1 { font-size: 1.5rem; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 1.1rem; margin: 2.2rem 0 .5rem; }
p { margin: .2rem 0 0; color: #52606d; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem 1.4rem .25rem 0; border-bottom: 1px solid #e4e7eb; text-align: left; vertical-align: top;
         overflow-wrap: anywhere; }
th { font-weight: 500; color: #52606d; white-space: nowrap; }
td.number, th.number { text-align: right; padding: .25rem .3rem .25rem 1.4rem; }
svg { display: block; width: 100%; height: auto; }
@media print { section { break-inside: avoid; } }
"""


def check_report(path: Path) -> None:
    """ConfigError where a report cannot be made: to be asked before the job, not after."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError("--report needs matplotlib, which is not installed; run: pip install 'llama_dist[report]'")
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise ConfigError(f"--report {path} cannot be written; name a file in a directory that exists")


def write_report(path: Path, title: str, summary: Summary, tally: Tally) -> None:
    """Draw and write the page. Raises OSError. Takes a second or two, most of it to load matplotlib."""
    replace_file(path, page(title, summary, tally).encode())


def page(title: str, summary: Summary, tally: Tally) -> str:
    """The page itself."""
    from llama_dist.frontend.plots import draw_plots

    name, _, rest = title.partition(", ")
    sections = [("summary", "Summary", _rows(summary)), ("percentiles", "Requests", _spreads(summary))]
    sections += draw_plots(tally)
    body = "\n".join(
        f'<section id="{key}">\n<h2>{html.escape(heading)}</h2>\n{content}\n</section>'
        for key, heading, content in sections
    )
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width">\n<title>{html.escape(title)}</title>\n'
        f"<style>{STYLE}</style>\n</head>\n<body>\n<h1>{html.escape(name)}</h1>\n<p>{html.escape(rest)}</p>\n"
        f"{body}\n</body>\n</html>\n"
    )


def _rows(summary: Summary) -> str:
    rows = (f"<tr><th>{html.escape(name)}</th><td>{html.escape(value)}</td></tr>" for name, value in summary.rows)
    return "<table>\n{}\n</table>".format("\n".join(rows))


def _spreads(summary: Summary) -> str:
    head = "".join(f'<th class="number">{html.escape(column)}</th>' for column in summary.columns)
    rows = [f"<tr><th></th>{head}</tr>"]
    for name, values in summary.spreads:
        cells = "".join(f'<td class="number">{html.escape(value)}</td>' for value in values)
        rows.append(f"<tr><th>{html.escape(name)}</th>{cells}</tr>")
    return "<table>\n{}\n</table>\n<p>{}</p>".format("\n".join(rows), html.escape(summary.note))
