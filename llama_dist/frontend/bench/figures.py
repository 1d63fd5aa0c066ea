"""Measured figures beside their limits. Pure functions of what was timed."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llama_dist.frontend.bench.cost import Cost, Model, job_cost, least_seconds, prefill_cost, step_cost

Key = tuple[str, int]
"""What was measured, and its size: ("decode", batch), ("sampled", batch), ("prefill", tokens); 0 for what has none.

"decode of memory" is the share of memory's rate that a step has in turns with reading it.
"""

RATE, SECONDS, BYTES, SHARE = "tokens/s", "s", "bytes", "share"
UNITS: Mapping[str, str] = {
    "decode": RATE,
    "sampled": RATE,
    "prefill": RATE,
    "batch": RATE,
    "ready": SECONDS,
    "first token": SECONDS,
    "reductions": SECONDS,
    "host memory": BYTES,
    "device memory": BYTES,
    "decode of memory": SHARE,
    "reproducible decode": SHARE,
    "reproducible prefill": SHARE,
}


@dataclass(frozen=True)
class Limits:
    """All ranks at once: `read` bytes/s, `product` FLOP/s in the run's type. `reduction`: seconds of one.

    `how`: the ways that reached them.
    """

    read: float
    product: float
    reduction: float | None
    how: Mapping[str, str]

    def to_json(self) -> dict[str, Any]:
        values = {
            "read": (self.read, "bytes/s"),
            "product": (self.product, "FLOP/s"),
            "reduction": (self.reduction, "s"),
        }
        return {
            name: {"value": value, "unit": unit, "how": self.how.get(name, "")}
            for name, (value, unit) in values.items()
        }

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> Limits:
        values = {name: item["value"] for name, item in data.items()}
        return Limits(**values, how={name: item["how"] for name, item in data.items() if item["how"]})


def best(readings: Sequence[Limits]) -> Limits:
    """The best of every reading: what the hardware can do, it can do."""
    read, product = max(readings, key=lambda r: r.read), max(readings, key=lambda r: r.product)
    reductions = [r.reduction for r in readings if r.reduction is not None]
    how = {"read": read.how["read"], "product": product.how["product"]}
    return Limits(read.read, product.product, min(reductions, default=None), how)


@dataclass(frozen=True)
class Figure:
    """`values`: one a round. `limit` in the same unit, and what sets it: memory, product, reduction or weights."""

    name: str
    size: int
    unit: str
    values: tuple[float, ...]
    limit: float | None = None
    bound: str | None = None

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    @property
    def share(self) -> float | None:
        """Of the limit that was reached: 1 is all of it."""
        if self.limit is None:
            return None
        return self.median / self.limit if self.unit == RATE else self.limit / self.median

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "size": self.size,
            "unit": self.unit,
            "median": self.median,
            "least": min(self.values),
            "most": max(self.values),
            "values": list(self.values),
            "limit": self.limit,
            "bound": self.bound,
            "share": self.share,
        }

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> Figure:
        values = tuple(data["values"])
        return Figure(data["name"], data["size"], data["unit"], values, data["limit"], data["bound"])


@dataclass(frozen=True)
class Sizes:
    """What the limits of the work depend on, beside the model.

    `contexts`: tokens of a sequence, on average, while so large a batch was decoded. `prompts` and `new`: of the mixed
    batch. `reductions` of a token. `held`: bytes of weights on the rank that holds most.
    """

    contexts: Mapping[int, float]
    prompts: Sequence[int]
    new: int
    reductions: int
    held: int


def limit_of(key: Key, model: Model, limits: Limits, sizes: Sizes) -> tuple[float, str] | None:
    """The least time or memory, or the highest rate, of what `key` names, and what sets it; None: nothing known."""
    name, size = key

    def rate(cost: Cost, tokens: int) -> tuple[float, str]:
        seconds, bound = least_seconds(cost, limits.product, limits.read)
        return tokens / seconds, bound

    if name in ("decode", "sampled"):
        return rate(step_cost(model, size, sizes.contexts[size]), size)
    if name == "prefill":
        return rate(prefill_cost(model, size), size)
    if name == "batch":
        return rate(job_cost(model, sizes.prompts, sizes.new), len(sizes.prompts) * sizes.new)
    if name == "reductions" and limits.reduction is not None:
        return sizes.reductions * limits.reduction, "reduction"
    if name == "device memory":
        return sizes.held, "weights"
    return None


def figures_of(measured: Mapping[Key, Sequence[float]], model: Model, limits: Limits, sizes: Sizes) -> list[Figure]:
    """Each measured thing as a figure beside its limit."""
    found = []
    for key, values in measured.items():
        limit, bound = limit_of(key, model, limits, sizes) or (None, None)
        found.append(Figure(*key, UNITS[key[0]], tuple(values), limit, bound))
    return found
