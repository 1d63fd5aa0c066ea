"""A job for test_faults.py: ranks that share messages, or add up numbers, until something happens to one of them."""

from __future__ import annotations

import os
import sys
import time

from llama_dist.config import RunConfig
from llama_dist.parallel.watch import guard


def main() -> int:
    import torch

    from llama_dist.parallel.control import check, share
    from llama_dist.parallel.layers import reduce
    from llama_dist.parallel.world import join, leave

    mode = sys.argv[1]
    world = join(RunConfig("none", device="cpu", timeout=6.0 if mode in ("stop", "stop sum") else 60.0))
    share(world, ["hello"] if world.rank == 0 else None)
    os.write(1, f"ready {world.rank} {os.getpid()}\n".encode())  # whole lines, whatever the other ranks write
    if mode == "raise" and world.rank == 1:
        raise ValueError("the third wheel came off")
    if mode == "desync":
        check(world, 5 if world.rank == 1 else 4, "the tokens sampled up to tick 9")
    if mode == "idle" and world.rank == 0:
        # as rank 0 waiting for a human: no collective notices that a peer is gone
        time.sleep(600)
    if mode in ("sum", "stop sum"):
        x = torch.zeros(1 << 20, dtype=torch.bfloat16)  # in many pieces
        while True:
            reduce(x)
    until = time.monotonic() + (1.0 if mode == "end" else 600.0)
    while share(world, [time.monotonic() < until] if world.rank == 0 else None)[0]:
        time.sleep(0.01)
    leave(world)
    return 0


if __name__ == "__main__":
    sys.exit(guard(main))
