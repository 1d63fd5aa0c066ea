"""What test_engine.py runs on every rank."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from llama_dist.engine import memory
from llama_dist.engine.engine import Engine
from llama_dist.engine.pages import PageTable
from llama_dist.engine.serve import Message, serve
from llama_dist.engine.stats import EngineStats
from llama_dist.errors import ConfigError
from llama_dist.model.cache import PAGE_SIZE
from llama_dist.request import Cancel, Completion, Request, SamplingParams, Stop
from tests.jobs import Ask, open_for

Row = tuple[tuple[int, ...], str, int | None, tuple[float, ...], str | None]
Prompts = Sequence[tuple[list[int], dict[str, Any]]]


@dataclass(frozen=True)
class Run:
    """RunConfig options, and a cache cut down to so many pages."""

    options: dict[str, Any] = field(default_factory=dict)
    pages: int | None = None


def engine_for(folder: str, run: Run) -> Engine:
    engine = open_for(Ask(folder, [], 0, run.options)).engine
    if run.pages is not None:
        engine.scheduler.table = PageTable(run.pages, PAGE_SIZE)
    return engine


def row(c: Completion) -> Row:
    return c.token_ids, c.finish_reason, c.text_len, c.logprobs or (), c.error


def answer_all(engine: Engine, prompts: Prompts) -> list[Row]:
    for i, (ids, params) in enumerate(prompts):
        engine.add(Request(f"{i}", tuple(ids), SamplingParams(**params)))
    done: dict[str, Row] = {}
    while not engine.idle:
        engine.scheduler.check()
        done.update((c.request_id, row(c)) for c in engine.step())
    return [done[f"{i}"] for i in range(len(prompts))]


def whole_run(folder: str, prompts: Prompts, run: Run) -> tuple[list[Row], dict[str, int]]:
    engine = engine_for(folder, run)
    rows = answer_all(engine, prompts)
    return rows, dataclasses.asdict(engine.stats())


def timeline(folder: str, lengths: Sequence[int]) -> list[list[str]]:
    """Which requests ran in each tick, two at a time."""
    engine = engine_for(folder, Run({"max_batch_size": 2}))
    for i, n in enumerate(lengths):
        engine.add(Request(f"{i}", (30 + i, 40), SamplingParams(max_tokens=n, temperature=0, ignore_eos=True)))
    ticks = []
    while not engine.idle:
        waiting = {s.request.id for s in engine.scheduler.waiting}
        before = set(engine.answers)
        engine.step()
        ticks.append(sorted(before - waiting | (waiting - {s.request.id for s in engine.scheduler.waiting})))
    return ticks


def serve_some(folder: str) -> dict[str, tuple[str, int]]:
    """Requests that come while others run, one cancelled, one dropped at the end; what the outbox heard."""
    session = open_for(Ask(folder, [], 0))
    six = SamplingParams(max_tokens=6, temperature=0, ignore_eos=True)
    long = SamplingParams(max_tokens=80, temperature=0, ignore_eos=True)
    script: dict[int, list[Message]] = {
        0: [Request("a", (30, 31), six), Request("b", (40,), long)],
        4: [Request("c", (50, 51, 52), six)],
        9: [Cancel("b"), Cancel("never heard of")],
        14: [Request("d", (60,), long)],
        18: [Stop(cancel=True)],
    }
    heard: dict[str, tuple[str, int]] = {}
    calls = 0

    def inbox(idle: bool) -> list[Message]:
        nonlocal calls
        calls += 1
        return script.get(calls - 1, [])

    def outbox(done: list[Completion], stats: EngineStats) -> None:
        heard.update((c.request_id, (c.finish_reason, len(c.token_ids))) for c in done)

    serve(session.world, session.engine, inbox, outbox)
    return heard


def faulty_row(folder: str, stage: str, rank: int, quantization: str | None = None) -> dict[str, Any]:
    """Four rows, without and with a fault that only token 77 meets, planted in one rank's weights."""
    session = open_for(Ask(folder, [], 0, {"quantization": quantization}))
    engine = session.engine
    greedy: dict[str, Any] = {"max_tokens": 6, "temperature": 0.0, "ignore_eos": True}
    short: Prompts = [([token], greedy) for token in (77, 78)]  # no pass has more than their newest tokens
    prompts: Prompts = [([20 + i] * 20 + [77 if i == 0 else 78], greedy) for i in range(4)]
    healthy = answer_all(engine, prompts)
    model = engine.model
    with torch.no_grad():
        undo = plant(model, stage, session.world.rank == rank)
    faulty = answer_all(engine, prompts)
    alone = [(row[1], row[4]) for row in answer_all(engine, short)]
    scoring: dict[str, Any] = {"max_tokens": 0, "prompt_logprobs": True}
    scores = answer_all(engine, [([20] * 10 + [token] + [20] * 10, scoring) for token in (77, 78)])
    undo()
    after = answer_all(engine, prompts[:1])[0]
    return {"healthy": healthy, "faulty": faulty, "short": alone, "scores": scores, "after": after}


def plant(model: Any, stage: str, here: bool) -> Any:
    """Make one stage on one rank answer NaN for rows that come from token 77; gives the function that ends it."""
    if stage != "the embedding":
        model.program = model.recordings = None  # hooks are for layers that are called one by one
    state: dict[str, torch.Tensor] = {}
    hooks = [model.tok_embeddings.register_forward_pre_hook(lambda m, a: state.update(bad=a[0] == 77))]
    if stage == "the embedding":
        if not here:
            return lambda: None
        weight, at = model.tok_embeddings.weight, 77 - model.tok_embeddings.vocab_start_index
        old = weight[at].clone()
        weight[at] = float("nan")
        return lambda: weight.data[at].copy_(old)
    layer = model.layers[int(stage[6])]
    module = layer.attention.wo if "attention" in stage else layer.feed_forward.w2
    if here:

        def spoil(m: Any, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor]:
            return (args[0].masked_fill(state["bad"][:, None], float("inf")),)

        hooks.append(module.register_forward_pre_hook(spoil, prepend=True))
    return lambda: [h.remove() for h in hooks]


def pages_with(folder: str, left: Sequence[int], options: dict[str, Any]) -> int | str:
    """The pages this rank's cache gets when ranks have so many bytes left, or why it gets none."""
    memory._memory_left = lambda world: left[world.rank]
    try:
        return open_for(Ask(folder, [], 0, options)).engine.cache.n_pages
    except ConfigError as err:
        return str(err)
