"""What test_recordings.py runs on every rank: the engine with recorded passes, and without."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llama_dist.model import recordings, transformer
from llama_dist.model.cache import KVCache
from llama_dist.model.recordings import Results, Step
from tests.engine_jobs import Prompts, Row, Run, answer_all, engine_for
from tests.reproducible_jobs import WAYS


def again(step: Step) -> tuple[Callable[[], object], Results]:
    """In place of `recorder` where no GPU is: a recording that computes anew what it reads from its own addresses."""
    results = tuple(result.clone() for result in step())

    def play() -> None:
        for ours, theirs in zip(results, step(), strict=True):
            ours.copy_(theirs)

    return play, results


def refused(step: Step) -> tuple[Callable[[], object], Results]:
    raise RuntimeError("CUDA error: operation not permitted when stream is capturing\nand more lines")


def answers(folder: str, device: str, way: str, kind: str, asked: Prompts) -> tuple[list[Row], list[int]]:
    """Rows, and how many rows each pass that was played had. `kind`: plain, recorded or refused."""
    played: list[int] = []
    record = {"recorded": recordings.recorder if device == "cuda" else lambda device: again}
    record["refused"] = lambda device: refused

    def lay_out(self: transformer.Transformer, cache: KVCache, max_seq_len: int) -> None:
        if kind != "plain":
            self.record(cache, max_seq_len, count(record[kind](self.norm.weight.device)))

    def count(record: recordings.Record) -> recordings.Record:
        def counted(step: Step) -> tuple[Callable[[], object], Results]:
            play, results = record(step)
            first = len(results) == 4  # of a pass in two parts: the stream, and the angles
            return lambda: (played.append(len(results[0])) if first else None, play()), results

        return counted

    transformer.Transformer.lay_out = lay_out  # type: ignore[method-assign]
    options: dict[str, Any] = {"reproducible": True, "dtype": "bfloat16", "device": device, "max_seq_len": 96}
    rows = answer_all(engine_for(folder, Run({**options, **WAYS[way].options}, WAYS[way].pages)), asked)
    return rows, played


def angles_move(folder: str) -> bool:
    """Whether the angles' table is elsewhere after the longest sequence than when recordings were made ready."""
    engine = engine_for(folder, Run({"dtype": "bfloat16", "device": "cpu", "max_seq_len": 3000}, 200))
    model = engine.model
    model.record(engine.cache, 3000, again)
    before = model.rope.known(1)[0].data_ptr()
    return model.rope.known(3000)[0].data_ptr() != before
