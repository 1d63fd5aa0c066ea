"""What an engine has done so far and holds now. No torch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class EngineStats:
    """One replica's counts after a tick: `waiting` and the pages of this moment, the rest since its start.

    - `running`: sequences the tick computed, those that ended in it too; `waiting`: not admitted yet, or preempted.
    - `prompt_tokens`: prompt tokens run through the model; `cached_tokens`: those the prefix cache had instead.
    - `new_tokens`: tokens drawn. `preemptions`: times a running sequence gave its pages up. `ticks`: forward passes.
    - `pages_held` of `pages_total`: pages of the KV cache that sequences own.
    """

    running: int
    waiting: int
    prompt_tokens: int
    new_tokens: int
    cached_tokens: int
    pages_held: int
    pages_total: int
    preemptions: int
    ticks: int
