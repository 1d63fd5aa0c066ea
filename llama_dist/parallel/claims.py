"""What ranks do at counters of the store, each in its own time: nobody's collective runs into a timeout meanwhile."""

from __future__ import annotations

import time

from llama_dist.parallel.control import claim, guarded
from llama_dist.parallel.world import World

LOOK_SECONDS = 0.1


def claimed(world: World, name: str) -> int:
    """How many numbers `claim(world, name)` has handed out to the whole job so far. No other rank waits."""
    return guarded(f"looking at {name}", lambda: int(world.store.add(f"claim/{name}", 0)))


def meet(world: World, name: str) -> None:
    """Wait until every rank has come here, however long the slowest takes; a dead or stuck one ends the job meanwhile.

    To be called as often as one likes, by all ranks the same number of times under one name.
    """
    turn = claim(world, f"meet/{name}")
    needed = (turn // world.size + 1) * world.size
    while claimed(world, f"meet/{name}") < needed:
        time.sleep(LOOK_SECONDS)
