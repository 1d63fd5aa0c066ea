"""How many pages the cache gets: what the smallest rank has left, or what was asked for."""

from __future__ import annotations

import logging

import torch

from llama_dist.config import RunConfig
from llama_dist.errors import ConfigError
from llama_dist.model.cache import PAGE_SIZE
from llama_dist.model.host_memory import host_memory
from llama_dist.model.transformer import Transformer
from llama_dist.parallel.control import collect
from llama_dist.parallel.world import World

log = logging.getLogger("llama_dist")

CUDA_SHARE = 0.9  # of what is free after loading; the rest is for activations and the library's workspaces
CPU_SHARE = 0.5  # of what the host has available, dealt over its ranks
SPARE = 2  # times what a full batch of longest sequences takes: beyond that the prefix cache gains little


def _memory_left(world: World) -> int:
    if world.device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(world.device)
        return int(free * CUDA_SHARE)
    return int(host_memory() * CPU_SHARE) // world.local_size


def count_pages(run: RunConfig, world: World, model: Transformer, max_seq_len: int) -> int:
    """Pages of the cache, alike on all ranks: the fewest that any has room for. Every rank calls it.

    Raises ConfigError, everywhere, where they do not hold one sequence of `max_seq_len` tokens.
    """
    left = run.kv_cache_memory or _memory_left(world)
    wanted = SPARE * run.max_batch_size * -(-max_seq_len // PAGE_SIZE)
    mine = left // model.page_bytes
    if run.kv_cache_memory is None:
        mine = min(mine, wanted)
    all_ranks = collect(world, mine)
    pages = min(all_ranks)
    needed = -(-max_seq_len // PAGE_SIZE)
    if pages < needed:
        rank = all_ranks.index(pages)
        raise ConfigError(
            f"rank {rank} has room for {pages * PAGE_SIZE} tokens of cache, less than --max_seq_len {max_seq_len}; "
            f"lower it, raise --kv_cache_memory to {needed * model.page_bytes} bytes, or start more ranks"
        )
    log.info("cache: %d tokens, %.2f GB a rank", pages * PAGE_SIZE, pages * model.page_bytes / 1e9)
    return int(pages)
