"""What test_triton_engine.py runs on every rank: the engine with the Triton kernels, interpreted where no GPU is."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

from llama_dist.engine import session
from llama_dist.kernels import build, triton_here
from tests.engine_jobs import Prompts, Row, Run, answer_all, engine_for
from tests.reproducible_jobs import WAYS
from tests.triton_cases import like_a_gpu

INTERPRETED = contextlib.ExitStack()


def interpret() -> None:
    """Let this process compute by Triton's interpreter what it would on a GPU."""
    INTERPRETED.enter_context(like_a_gpu())
    build.library = lambda: None  # type: ignore[assignment]
    triton_here.serves = lambda x: x.dtype in triton_here.DTYPES


def every_way(
    folder: str, device: str, dtype: str, ways: Sequence[str], asked: Prompts, quantization: str | None = None
) -> tuple[dict[str, list[Row]], str]:
    """Rows of each way, and the numeric mode."""
    if device == "cpu":
        interpret()
    found = {}
    for way in ways:
        options = {"reproducible": True, "dtype": dtype, "device": device, "max_seq_len": 96, **WAYS[way].options}
        options["quantization"] = quantization
        engine = engine_for(folder, Run(options, WAYS[way].pages))
        found[way] = answer_all(engine, asked)
    mode = session.numeric_mode(engine.model.norm.weight.dtype, quantization, engine.world.device, 8)
    return found, mode
