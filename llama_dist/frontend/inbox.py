"""Waiting for rank 0's next message, on every rank."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llama_dist.parallel.control import share
from llama_dist.parallel.world import World

POLL_SECONDS = 1.0  # how long rank 0 may look for input before it shares that there is none yet


def next_message(world: World, poll: Callable[[], Any | None]) -> Any:
    """What rank 0's `poll` gives (JSON), on every rank. `poll` returns None after POLL_SECONDS at most.

    An empty inbox is shared in between, so a human may take longer than any group's timeout. An exception of `poll`
    is rank 0's own, and ends the job as such.
    """
    while True:
        messages: list[Any] | None = None
        if world.rank == 0:
            message = poll()
            messages = [] if message is None else [message]
        shared = share(world, messages)
        if shared:
            return shared[0]
