"""Decode steps and readings of memory in turn: the share of its rate that a step has, where that rate drifts."""

from __future__ import annotations

import statistics

import torch

from llama_dist.frontend.bench.cost import Model, step_cost
from llama_dist.frontend.bench.limits import read_once
from llama_dist.frontend.bench.work import Player

TURNS = 8
TURN_STEPS = 8
STEPS = TURNS * TURN_STEPS  # that a sequence needs room for


def share_of_memory(player: Player, model: Model, memory: torch.Tensor) -> float:
    """The rate at which a step of one sequence reads over that at which `memory` is read before and after, the median
    of some turns. Every rank calls it alike, with as much memory.
    """
    session = player.session
    player.decoding(1)
    shares = []
    before = read_once(session.world, memory)
    for _ in range(TURNS):
        (sequence,) = session.engine.scheduler.running
        context = len(sequence.tokens) + (TURN_STEPS - 1) / 2
        read = session.world.n_replicas * TURN_STEPS * step_cost(model, 1, context).bytes
        rate = read / player.steps(TURN_STEPS)
        after = read_once(session.world, memory)
        shares.append(rate / ((before + after) / 2))
        before = after
    player.drop()
    return statistics.median(shares)
