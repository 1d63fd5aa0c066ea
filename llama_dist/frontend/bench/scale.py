"""Cost as the work grows: batch, context, ranks, lines of a file. Each series is a row of the report."""

from __future__ import annotations

import logging
import os
import statistics
import time
from collections.abc import Mapping, Sequence

import torch

from llama_dist.frontend.batch.background import Background
from llama_dist.frontend.bench.children import ChildFailed, ourselves
from llama_dist.frontend.bench.cost import Model, prefill_cost, step_cost
from llama_dist.frontend.bench.figures import RATE
from llama_dist.frontend.bench.rows import ROWS, time_rows
from llama_dist.frontend.bench.scaling import Point, Series
from llama_dist.frontend.bench.work import PROMPT, WARM, Player
from llama_dist.frontend.inbox import next_message
from llama_dist.frontend.options import BenchOptions
from llama_dist.parallel.control import share

log = logging.getLogger("llama_dist")

BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
CONTEXTS = (128, 512, 2048, 8192, 32768)
RANKS = (1, 2, 4)
STEPS = 8
PATIENCE = 300.0  # seconds that the next size of a series may take, by the last one


def within_patience(player: Player, seconds: float, growth: float) -> bool:
    """Whether a size that takes `growth` times as long is measured too: rank 0's clock decides for all."""
    world = player.session.world
    return bool(share(world, [seconds * growth <= PATIENCE] if world.rank == 0 else None)[0])


def batch_series(player: Player) -> Series:
    """Decoding ever more sequences: work is tokens."""
    points: list[Point] = []
    note = ""
    for batch in BATCHES:
        note = player.no_room(batch, PROMPT + WARM + STEPS + batch) or ""
        if not note and points and not within_patience(player, (WARM + STEPS) * points[-1].seconds, 2):
            note = f"more would take over {PATIENCE:.0f} s"
        if note:
            break
        log.info("scale: batch %d", batch)
        rate, _ = player.decode(batch, steps=STEPS)
        points.append(Point(batch, batch, batch / rate, rate))
    return Series("decode", "sequences", RATE, tuple(points), note)


def context_series(player: Player, model: Model) -> tuple[Series, Series]:
    """A prompt ever longer, and steps at its end: work is FLOPs of the prompt, and bytes read by a step."""
    prompts: list[Point] = []
    steps: list[Point] = []
    note = ""
    for n in CONTEXTS:
        note = player.no_room(1, n + WARM + STEPS + 1) or ""
        growth = (n / prompts[-1].x) ** 2 if prompts else 1.0
        if not note and prompts and not within_patience(player, prompts[-1].seconds, growth):
            note = f"more could take over {PATIENCE:.0f} s"
        if note:
            break
        log.info("scale: context %d", n)
        began = time.perf_counter()
        player.decoding(1, n, warm=0)
        seconds = time.perf_counter() - began
        prompts.append(Point(n, prefill_cost(model, n).flops, seconds, n / seconds))
        player.steps(WARM)
        each = player.steps(STEPS) / STEPS
        player.drop()
        steps.append(Point(n, step_cost(model, 1, n).bytes, each, 1 / each))
    return (
        Series("prefill", "tokens of context", RATE, tuple(prompts), note),
        Series("decode", "tokens of context", RATE, tuple(steps), note),
    )


def rows_series(player: Player) -> Series:
    """Files of ever more lines: work is lines. Rank 0 alone does it, kept in touch with the others."""
    world = player.session.world
    points: list[Point] = []
    note = ""
    for n in ROWS:
        if points and not within_patience(player, points[-1].seconds, n / points[-1].x):
            note = f"more would take over {PATIENCE:.0f} s"
            break
        log.info("scale: %d lines", n)
        seconds = _on_rank_0(player, n) if world.size > 1 else time_rows(n)
        points.append(Point(n, n, seconds, n / seconds))
    return Series("lines of a batch file, without the model", "lines", "lines/s", tuple(points), note)


def _on_rank_0(player: Player, n: int) -> float:
    world = player.session.world
    timing = Background(lambda: time_rows(n)) if world.rank == 0 else None
    return float(next_message(world, timing.poll if timing is not None else lambda: None))


def most_ranks(device: torch.device) -> int:
    """As many as there are GPUs, or cores that this process may use."""
    return torch.cuda.device_count() if device.type == "cuda" else len(os.sched_getaffinity(0))


def ranks_series(options: BenchOptions, most: int) -> list[Series]:
    """Fresh runs on ever more ranks of this machine, in turn: seconds of a step, for which work is the ranks."""
    tried = [n for n in RANKS if n <= most]
    rates: dict[int, dict[int, list[float]]] = {}
    note = "" if len(tried) == len(RANKS) else f"more ranks than the {most} GPUs or cores here"
    for number in range(options.repeats):
        for ranks in tried:
            log.info("scale: %d ranks, round %d of %d", ranks, number + 1, options.repeats)
            try:
                found = ourselves(options, ranks, ("decode",))
            except ChildFailed as err:
                note = f"{ranks} ranks: {err}"
                continue
            for figure in found.figures:
                if figure.name == "decode":
                    rates.setdefault(figure.size, {}).setdefault(ranks, []).append(figure.median)
    return [Series(f"decode, batch {batch}", "ranks", RATE, _points(batch, by), note) for batch, by in rates.items()]


def _points(batch: int, by_ranks: Mapping[int, Sequence[float]]) -> tuple[Point, ...]:
    rates = {n: statistics.median(values) for n, values in sorted(by_ranks.items())}
    return tuple(Point(n, n, batch / rate, rate) for n, rate in rates.items())
