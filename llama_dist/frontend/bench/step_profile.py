"""Where the time of a decode step goes: a clock around the functions that do the work, for this measurement only.

torch's profiler does not see the C++ kernels. The clock belongs to one function at a time: what calls another stops
counting until that returns.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

from llama_dist.kernels import program
from llama_dist.model.transformer import Transformer

PYTHON = "Python of the tick"
FORWARD = "Python of the forward pass"
PRODUCTS, ATTENTION, SMALL, REDUCTIONS = "products", "attention", "norms, rotation, gate", "reductions"
LOGITS, SAMPLING = "logits", "sampling"
WHOLE = (LOGITS,)
"""What these call is theirs too, reductions excepted."""

TARGETS = (
    ("engine.engine", "Engine.step", PYTHON),
    ("engine.engine", "Engine._draw", SAMPLING),
    ("engine.engine", "Engine._take", PYTHON),
    ("engine.engine", "lay", PYTHON),
    ("engine.sampler", "sample", SAMPLING),
    ("model.transformer", "Transformer.forward", FORWARD),
    ("model.transformer", "Transformer.run_on", FORWARD),
    ("model.transformer", "Transformer.logits", LOGITS),
    ("model.rope", "Rope.angles", SMALL),
    ("parallel.layers", "VocabParallelEmbedding.forward", SMALL),
    ("parallel.layers", "product", PRODUCTS),
    ("parallel.layers", "partial_sums", PRODUCTS),
    ("parallel.layers", "reduce", REDUCTIONS),
    ("parallel.layers", "gather", REDUCTIONS),
    ("parallel.layers", "total_of_ranks", REDUCTIONS),
    ("kernels.attention", "attend", ATTENTION),
    ("model.attention", "Attention._one", ATTENTION),
    ("kernels.small", "rms_norm", SMALL),
    ("kernels.small", "add_rms_norm", SMALL),
    ("kernels.small", "rope_write", SMALL),
    ("kernels.small", "silu_mul", SMALL),
)
"""Module, function or method, and whose its time is."""

OF_PROGRAM = {
    program.NORM: SMALL,
    program.ROPE: SMALL,
    program.ATTEND: ATTENTION,
    program.GATE: SMALL,
    program.PLANES: REDUCTIONS,
    program.PACKED: PRODUCTS,
    program.SHARED_SUM: REDUCTIONS,
    program.SHARED_PLANES: REDUCTIONS,
    program.EMBED: SMALL,
    program.LIKELIEST: SAMPLING,
    program.SHARED_LIKELIEST: SAMPLING,
    program.HEAD: LOGITS,
}
"""The same of the operations that run in one call, which then belongs to FORWARD less these."""


class Clock:
    """Seconds by label."""

    def __init__(self, now: Callable[[], float] = time.perf_counter) -> None:
        self.seconds: dict[str, float] = {}
        self._now, self._labels, self._since = now, [""], now()

    def _charge(self) -> None:
        now = self._now()
        label = self._labels[-1]
        if label:
            self.seconds[label] = self.seconds.get(label, 0.0) + now - self._since
        self._since = now

    def enter(self, label: str) -> None:
        self._charge()
        within = self._labels[-1]
        self._labels.append(within if within in WHOLE and label != REDUCTIONS else label)

    def leave(self) -> None:
        self._charge()
        self._labels.pop()

    def move(self, seconds: float, source: str, target: str) -> None:
        """Part of what one label has is another's."""
        if seconds:
            self.seconds[source] -= seconds
            self.seconds[target] = self.seconds.get(target, 0.0) + seconds

    def around(self, function: Callable[..., Any], label: str) -> Callable[..., Any]:
        """The function, timed."""

        @functools.wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            self.enter(label)
            try:
                return function(*args, **kwargs)
            finally:
                self.leave()

        return timed


def places(module: str, name: str) -> list[tuple[Any, str]]:
    """Where a function is looked up: a method at its class, a function in every module that has it."""
    owner = importlib.import_module(f"llama_dist.{module}")
    if "." in name:
        cls, method = name.split(".")
        return [(getattr(owner, cls), method)]
    function = getattr(owner, name)
    ours = [m for key, m in sys.modules.items() if key.startswith("llama_dist.")]
    return [(m, key) for m in ours for key, value in vars(m).items() if value is function]


@contextlib.contextmanager
def timed(model: Transformer) -> Iterator[Clock]:
    """The functions of TARGETS, and the operations of the model's program, timed while this is open."""
    clock = Clock()
    laid_out = model.program[1] if model.program is not None else None
    if laid_out is not None:
        laid_out.seconds = torch.zeros(program.CLOCKS, dtype=torch.float64)
    before: list[tuple[Any, str, Any]] = []
    try:
        for module, name, label in TARGETS:
            found = places(module, name)
            function = clock.around(getattr(*found[0]), label)
            for owner, key in found:
                before.append((owner, key, getattr(owner, key)))
                setattr(owner, key, function)
        yield clock
    finally:
        for owner, key, function in reversed(before):
            setattr(owner, key, function)
        if laid_out is not None and laid_out.seconds is not None:
            for kind, seconds in enumerate(laid_out.seconds.tolist()):
                clock.move(seconds, FORWARD, OF_PROGRAM[kind])
            laid_out.seconds = None
