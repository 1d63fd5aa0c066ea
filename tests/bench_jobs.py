"""What the tests of `bench` run on every rank: the command itself, over little work and small probes."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path
from typing import Any

import torch

from llama_dist import cli
from llama_dist.checkpoint.synthetic import RandomReader
from llama_dist.config import RunConfig
from llama_dist.engine.session import check_run, open_session
from llama_dist.frontend.bench import limits, scale
from llama_dist.model.shapes import SHAPES
from llama_dist.parallel.launch import read_launch
from llama_dist.text.ids import ids_tokenizer
from tests.jobs import Answer, Ask, answer


def small() -> None:
    """Probes that take no time; they measure nothing then."""
    limits.READ_BYTES, limits.READINGS, limits.SIDES = 2**23, 1, {"cpu": (128,)}
    scale.BATCHES, scale.CONTEXTS, scale.ROWS = (1, 2, 4), (16, 32, 64), (10, 20, 40)


def bench(words: list[str], out: str) -> tuple[int, str, dict[str, Any] | None]:
    """The exit code, what this rank printed, and what it wrote to --json."""
    small()
    path = Path(out) / f"rank-{read_launch().rank}.json"
    line = cli.parse(["bench", *words, f"--json={path}"])
    with contextlib.redirect_stdout(io.StringIO()) as stdout:
        code = cli.prepare(line, read_launch().size)()
    return code, stdout.getvalue(), json.loads(path.read_text()) if path.exists() else None


def random_answers(shape: str, prompts: list[list[int]]) -> list[Answer]:
    """Greedy answers of random weights."""
    run = RunConfig(shape, device="cpu", dtype="float32", max_seq_len=64, check_every=1)
    reader = RandomReader(SHAPES[shape], 1, torch.device("cpu"))
    session = open_session(run, check_run(run, reader, ids_tokenizer(SHAPES[shape].vocab_size)))
    return answer(session, Ask(shape, prompts, 8))
