"""Serving what comes: each tick the first rank of a replica shares its inbox, and all ranks take the same step."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from llama_dist.engine.engine import Engine, OnToken
from llama_dist.engine.stats import EngineStats
from llama_dist.parallel.control import share
from llama_dist.parallel.world import World
from llama_dist.request import Cancel, Completion, Request, Stop

Message = Request | Cancel | Stop
Inbox = Callable[[bool], Sequence[Message]]
"""Asked on the replica's first rank once a tick: what has come. Told whether the engine is idle: then it may wait,
for a second at most, so that the groups stay alive."""
Outbox = Callable[[list[Completion], EngineStats], None]
"""Told on the replica's first rank after every tick what has ended."""


def _pack(message: Message) -> list[Any]:
    if isinstance(message, Request):
        return ["request", message.to_json()]
    return ["cancel" if isinstance(message, Cancel) else "stop", dataclasses.asdict(message)]


def _unpack(packed: list[Any]) -> Message:
    kind, data = packed
    if kind == "request":
        return Request.from_json(data)
    return Cancel(**data) if kind == "cancel" else Stop(**data)


def serve(world: World, engine: Engine, inbox: Inbox, outbox: Outbox, on_token: OnToken | None = None) -> None:
    """Tick until a Stop has come and everything before it is answered. Every rank of the replica calls it alike.

    Requests in the inbox have been validated. `on_token` hears of each token, on the replica's first rank.
    """
    channel = world.replica_channel
    speaks = channel.rank == 0
    stopping = False
    while not (stopping and engine.idle):
        mine = [_pack(m) for m in inbox(engine.idle)] if speaks else None
        done: list[Completion] = []
        for message in map(_unpack, share(world, mine, channel)):
            if isinstance(message, Request):
                engine.add(message)
            elif isinstance(message, Cancel):
                done += engine.cancel(message.id)
            else:
                stopping = True
                if message.cancel:
                    done += engine.cancel(*engine.answers)
        if not engine.idle:
            done += engine.step(on_token if speaks else None)
        if speaks:
            outbox(done, engine.stats())
