"""What test_reproducible.py runs on every rank: the same requests, run in many ways."""

from __future__ import annotations

import functools
import random
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from llama_dist import Llama
from llama_dist.engine import numerics, session
from llama_dist.errors import ConfigError
from llama_dist.model import attention, transformer
from llama_dist.parallel import layers
from llama_dist.parallel.launch import read_launch
from llama_dist.quant.pack import unpack
from llama_dist.quant.packed import Packed
from tests.engine_jobs import Prompts, Row, Run, answer_all, engine_for

WAYS: dict[str, Run] = {
    "alone": Run({"max_batch_size": 1, "prefix_caching": False}),
    "together": Run({"max_batch_size": 64}),
    "in chunks": Run({"max_batch_size": 5, "max_batch_tokens": 7}),
    "preempted": Run({"max_batch_size": 8, "prefix_caching": False}, pages=14),
}


def prompts(n: int, vocab: int) -> Prompts:
    """Half of them greedy, half sampled; some begin alike; logprobs of all tokens, prompts too."""
    dice = random.Random(4)
    start = [dice.randrange(5, vocab) for _ in range(35)]
    found = []
    for i in range(n):
        ids = start[: dice.choice([0, 0, 20, 35])] + [dice.randrange(5, vocab) for _ in range(dice.randint(1, 24))]
        params: dict[str, Any] = {"max_tokens": dice.randint(3, 16), "logprobs": True, "echo": True, "seed": i}
        params |= {"temperature": 0.0} if i % 2 else {"temperature": 1.0, "top_p": 0.95}
        found.append((ids, params))
    return found


def torchs_product(
    x: torch.Tensor, w: torch.Tensor | Packed, bias: torch.Tensor | None, reproducible: bool
) -> torch.Tensor:
    """In place of `layers.product`: its bits depend on the number of rows."""
    return F.linear(x, unpack(w, x.dtype) if isinstance(w, Packed) else w, bias)


def break_it(what: str) -> None:
    """Undo one thing that keeps a row's bits its own; layers are called one by one, so that it takes effect."""
    transformer.Transformer.lay_out = lambda self, cache, max_seq_len: None  # type: ignore[method-assign]
    if what == "the order of a sum":  # rank after rank, as an all-reduce may take it
        layers.total = lambda nodes, values: functools.reduce(torch.add, values)
        layers.shared.of = lambda group: None
    elif what == "the tiling of rows":
        layers.product = torchs_product
    elif what == "the borders of chunks":
        attention.pages.attend = attention.pages.attend_twin
    elif what == "where a number stands":
        layers.silu_mul = lambda a, b: F.silu(a.contiguous()) * b
    else:
        raise ValueError(what)


def every_way(
    folder: str,
    dtype: str,
    ways: Sequence[str],
    n: int,
    vocab: int,
    threads: int,
    broken: str | None = None,
    quantization: str | None = None,
) -> dict[str, tuple[list[Row], int]]:
    """Rows of each way, and how often a sequence lost its pages in it."""
    torch.set_num_threads(threads)
    if broken is not None:
        break_it(broken)
        session.refuse_unsteady = lambda model, world: None
    found = {}
    usual = {"reproducible": True, "dtype": dtype, "max_seq_len": 96, "quantization": quantization}
    for way in ways:
        run = Run({**usual, **WAYS[way].options}, WAYS[way].pages)
        engine = engine_for(folder, run)
        torch.set_num_threads(threads)
        rows = answer_all(engine, prompts(n, vocab))
        found[way] = rows, engine.stats().preemptions
    return found


def from_python(folder: str) -> Any:
    """Ids and logprobs of `Llama.generate`."""
    llama = Llama.build(folder, max_seq_len=96, dtype="bfloat16", device="cpu", reproducible=True)
    ids = [p for p, _ in prompts(4, 200)]
    return llama.generate(ids, 12, temperature=1.0, logprobs=True, echo=True)


def refused(folder: str, what: str) -> str:
    """What is said at start-up where one thing is broken on the last rank."""
    launch = read_launch()
    if launch.rank == launch.size - 1:
        if what == "the product":
            layers.product = torchs_product
        elif what == "attention":
            attention.pages.attend = attention.pages.attend_twin
        else:
            numerics.steady = lambda function, x: function(x)
    try:
        engine_for(folder, Run({"reproducible": True, "dtype": "float32"}))
    except ConfigError as err:
        return str(err)
    return ""
