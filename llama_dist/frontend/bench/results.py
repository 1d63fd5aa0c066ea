"""All results of a run, and how runs of several processes become one."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from llama_dist.frontend.bench.figures import RATE, Figure, Key, Limits, best
from llama_dist.frontend.bench.machine import About
from llama_dist.frontend.bench.scaling import Series

VERSION = 1  # of the JSON


@dataclass(frozen=True)
class Contender:
    """What another program reached at the same work: `values` by what was measured, one a round."""

    name: str
    about: str
    values: Mapping[Key, Sequence[float]]

    def ratio(self, figure: Figure) -> float | None:
        """How many times better ours is, by the medians: faster, sooner, smaller."""
        values = self.values.get((figure.name, figure.size))
        if not values:
            return None
        theirs = statistics.median(values)
        return figure.median / theirs if figure.unit == RATE else theirs / figure.median


@dataclass(frozen=True)
class Results:
    """`left_out`: (what, why). `profiles`: by batch, shares of a decode step by what they went to."""

    about: About
    figures: Sequence[Figure]
    limits: Limits
    left_out: Sequence[tuple[str, str]]
    profiles: Mapping[int, Mapping[str, float]]
    contenders: Sequence[Contender] = ()
    series: Sequence[Series] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        figures = {(figure.name, figure.size): figure for figure in self.figures}
        return {
            "version": VERSION,
            "about": asdict(self.about),
            "figures": [figure.to_json() for figure in self.figures],
            "limits": self.limits.to_json(),
            "left_out": [{"what": what, "why": why} for what, why in self.left_out],
            "profiles": {str(batch): dict(shares) for batch, shares in self.profiles.items()},
            "contenders": [
                {
                    "name": contender.name,
                    "about": contender.about,
                    "figures": [
                        {
                            "name": key[0],
                            "size": key[1],
                            "median": statistics.median(values),
                            "values": list(values),
                            "ratio": contender.ratio(figures[key]) if key in figures else None,
                        }
                        for key, values in contender.values.items()
                        if values
                    ],
                }
                for contender in self.contenders
            ],
            "series": [series.to_json() for series in self.series],
        }

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> Results:
        """What `to_json` gave, of a run without contenders and series."""
        return Results(
            About(**data["about"]),
            [Figure.from_json(figure) for figure in data["figures"]],
            Limits.from_json(data["limits"]),
            [(item["what"], item["why"]) for item in data["left_out"]],
            {int(batch): shares for batch, shares in data["profiles"].items()},
        )


def merged(runs: Sequence[Results]) -> Results:
    """Several runs of the same work as one: all values, the best limits; the rest is the first's."""
    found: dict[Key, list[Figure]] = {}
    for run in runs:
        for figure in run.figures:
            found.setdefault((figure.name, figure.size), []).append(figure)
    figures = []
    for same in found.values():
        limits = [figure.limit for figure in same if figure.limit is not None]
        furthest = (max if same[0].unit == RATE else min)(limits, default=None)
        values = tuple(value for figure in same for value in figure.values)
        figures.append(replace(same[0], values=values, limit=furthest))
    return replace(runs[0], figures=figures, limits=best([run.limits for run in runs]))
