"""Where a row's logits went wrong: the sequence is computed again, alone, with every partial product looked at."""

from __future__ import annotations

import torch
from torch import nn

from llama_dist.engine.scheduler import Sequence
from llama_dist.model.cache import PAGE_SIZE, Span, lay
from llama_dist.model.transformer import Transformer
from llama_dist.parallel.control import collect
from llama_dist.parallel.layers import RowParallelLinear, VocabParallelEmbedding, product
from llama_dist.parallel.world import World
from llama_dist.quant.packed import Packed

CHUNK = 512  # tokens computed at a time: what fits beside a full cache


def _stages(model: Transformer) -> list[tuple[str, nn.Module]]:
    """The places where ranks put their parts together, in the order they are passed."""
    stages: list[tuple[str, nn.Module]] = [("the embedding", model.tok_embeddings)]
    for i, layer in enumerate(model.layers):
        assert isinstance(layer.attention, nn.Module) and isinstance(layer.feed_forward, nn.Module)
        stages += [(f"layer {i}, attention", layer.attention.wo), (f"layer {i}, feed-forward", layer.feed_forward.w2)]  # type: ignore[list-item]
    return [*stages, ("the output", model.output)]


def find_fault(model: Transformer, world: World, sequence: Sequence) -> str:
    """What to say of a sequence whose logits are NaN or infinite: where it began, and on which rank.

    Every rank of the replica calls it, having seen the same logits. A rank's part is its product before the reduction.
    The recomputation has a cache of its own: pages that others share are not touched.
    """
    stages = _stages(model)
    first = len(stages)
    hooks = []

    def looker(i: int) -> object:
        def look(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            nonlocal first
            if i < first and not _is_sound(module, args[0]):
                first = i

        return look

    for i, (_, module) in enumerate(stages):
        hooks.append(module.register_forward_pre_hook(looker(i)))  # type: ignore[arg-type]
    try:
        tokens = sequence.tokens
        pages = range(-(-len(tokens) // PAGE_SIZE))
        cache = model.new_cache(len(pages))
        for start in range(0, len(tokens), CHUNK):
            chunk = tokens[start : start + CHUNK]
            span = Span(pages, start, len(chunk), sequence.prompt_len)
            model.logits(model(lay([(span, chunk)], world.device), cache)[-1:])
    finally:
        for hook in hooks:
            hook.remove()
    firsts = collect(world, first, world.replica_channel)
    where = min(firsts)
    request = sequence.request.id
    if where == len(stages):
        return f"request {request}: its logits were NaN or infinite, which a second computation did not repeat"
    rank = world.replica_channel.ranks[firsts.index(where)]
    return f"request {request}: its numbers became NaN or infinite in {stages[where][0]}, on rank {rank}"


def _is_sound(module: nn.Module, x: torch.Tensor) -> bool:
    if isinstance(module, RowParallelLinear):
        return bool(module.own(x).isfinite().all())
    if not isinstance(module, VocabParallelEmbedding):
        weight: torch.Tensor | Packed = module.weight  # type: ignore[assignment]
        return bool(product(x, weight, None, reproducible=False).isfinite().all())
    mine = x[(x >= module.vocab_start_index) & (x < module.vocab_end_index)] - module.vocab_start_index
    return bool(module.held(mine).isfinite().all())
