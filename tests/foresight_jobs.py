"""What test_foresight.py runs on every rank: the engine beginning passes before it has seen the tokens."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch

from llama_dist.engine import draws
from llama_dist.engine import engine as engine_module
from llama_dist.engine.engine import Engine
from llama_dist.engine.foresight import Foreseen, Pass
from llama_dist.engine.sampler import Wanted
from llama_dist.kernels.draw import UNSURE
from llama_dist.model import recordings, transformer
from llama_dist.model.cache import KVCache
from llama_dist.parallel.launch import read_launch
from tests.engine_jobs import Prompts, Row, Run, answer_all, engine_for, faulty_row
from tests.recording_jobs import again

Lay = Callable[[transformer.Transformer, KVCache, int], None]


def by_layers(self: transformer.Transformer, cache: KVCache, max_seq_len: int) -> None:
    pass


def by_recordings(self: transformer.Transformer, cache: KVCache, max_seq_len: int) -> None:
    device = self.norm.weight.device
    self.record(cache, max_seq_len, again if device.type == "cpu" else recordings.recorder(device))


def count(kind: type[Foreseen] | type[Pass] = Foreseen) -> Counter[str]:
    """Of how many passes of that kind the whole is of use from now on, or a part, or none."""
    found: Counter[str] = Counter()
    rows_of: Callable[[Any], list[int]] = kind.rows

    def rows(self: Any) -> list[int]:
        rows = rows_of(self)
        found["whole" if len(rows) == len(self.works) else "part" if rows else "none"] += 1
        return rows

    kind.rows = rows  # type: ignore[method-assign]
    return found


def leave_some_to_the_sampler() -> None:
    """Every seventh drawn token is left to the sampler, as where it is close; on every rank another."""
    real, calls = draws.compiled_draw, read_launch().rank

    def some(wanted: Sequence[Wanted]) -> list[int]:
        nonlocal calls
        calls += len(wanted)
        return [UNSURE if (calls + i) % 7 == 0 else token for i, token in enumerate(real(wanted))]

    draws.compiled_draw = some


def answers(folder: str, prompts: Prompts, run: Run, way: str, foresees: bool) -> tuple[list[Row], dict[str, int]]:
    """Rows, and how passes were come by. `way`: as the device has it, or by layers or recordings."""
    lay: dict[str, Lay] = {"layers": by_layers, "recordings": by_recordings}
    if way in lay:
        transformer.Transformer.lay_out = lay[way]  # type: ignore[method-assign]
    leave_some_to_the_sampler()
    counts = count()
    engine = engine_for(folder, run)
    engine.foresees = foresees
    rows = answer_all(engine, prompts)
    assert engine._foreseen is None and engine.scheduler.table.n_held == 0
    return rows, dict(counts)


def without_waiting(folder: str, prompts: Prompts, run: Run) -> tuple[list[Row], list[Row]]:
    """Rows of two runs on a GPU, in the second of which an error ends what waits for it but by `Told`."""
    engine = engine_for(folder, run)
    before = answer_all(engine, prompts)
    choose = Engine._choose

    def may_wait(function: Callable[..., Any]) -> Callable[..., Any]:
        def waits(*args: Any) -> Any:
            torch.cuda.set_sync_debug_mode("default")
            try:
                return function(*args)
            finally:
                torch.cuda.set_sync_debug_mode("error")

        return waits

    def watched(self: Engine, *args: Any) -> Any:
        torch.cuda.set_sync_debug_mode("error")
        try:
            return choose(self, *args)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    Engine._choose = watched  # type: ignore[method-assign]
    engine_module.settle = may_wait(engine_module.settle)
    recordings.Recordings._record_new = may_wait(recordings.Recordings._record_new)  # type: ignore[method-assign]
    return before, answer_all(engine, prompts)


def a_fault(folder: str, stage: str, rank: int) -> dict[str, Any]:
    init = Engine.__init__

    def foreseeing(self: Engine, *args: Any, **more: Any) -> None:
        init(self, *args, **{**more, "foresees": True})

    Engine.__init__ = foreseeing  # type: ignore[method-assign]
    return faulty_row(folder, stage, rank)
