"""What work costs at least: floating-point operations, and bytes read from memory. Arithmetic, no torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from llama_dist.config import ModelConfig
from llama_dist.engine.plan import units_of, weight_sizes
from llama_dist.model.families import tensor_shapes

EMBEDDING = "tok_embeddings.weight"


@dataclass(frozen=True)
class Cost:
    """All ranks together."""

    flops: float
    bytes: float


@dataclass(frozen=True)
class Model:
    """`weights`: bytes that a step reads. `kv`: bytes of keys and values a token. `products`: FLOPs a token in the
    layers; `head`: for its logits; `pair`: for a query and a key, in all layers and heads.
    """

    weights: float
    kv: float
    products: float
    head: float
    pair: float


def model_of(config: ModelConfig, dtype_bytes: int, quantization: str | None = None) -> Model:
    """Of a model whose weights, keys and values take `dtype_bytes` an entry, where the weights are not packed."""
    sizes = {name: math.prod(shape) for name, shape in tensor_shapes(config).items()}
    head = config.vocab_size * config.dim
    layers = sum(sizes.values()) - sizes[EMBEDDING] - (0 if config.tied_embeddings else head)
    held = weight_sizes(config, units_of(config, 1, None), 1, dtype_bytes, quantization)
    # Of an embedding that is not the output matrix too, a step reads a row a token.
    is_output = config.tied_embeddings and quantization is None
    return Model(
        weights=sum(held) - (0 if is_output else dtype_bytes * sizes[EMBEDDING]),
        kv=2.0 * config.n_layers * config.n_kv_heads * config.head_dim * dtype_bytes,
        products=2.0 * layers,
        head=2.0 * head,
        pair=4.0 * config.n_layers * config.n_heads * config.head_dim,
    )


def step_cost(model: Model, batch: int, context: float) -> Cost:
    """One token for each of `batch` sequences that have `context` tokens, the newest included."""
    flops = batch * (model.products + model.head + model.pair * context)
    return Cost(flops, model.weights + batch * context * model.kv)


def prefill_cost(model: Model, n: int) -> Cost:
    """A prompt of `n` tokens and the logits of its last; every token attends to those before it and itself."""
    return Cost(n * model.products + model.head + model.pair * n * (n + 1) / 2, model.weights + n * model.kv)


def job_cost(model: Model, prompts: Sequence[int], new: int) -> Cost:
    """Prompts of so many tokens and `new` for each, computed together: the weights are read once a new token."""
    flops = read = 0.0
    for n in prompts:
        last = n + new - 1  # tokens that are computed; the newest is only drawn
        flops += last * model.products + new * model.head + model.pair * last * (last + 1) / 2
        read += model.kv * (n + sum(range(n + 1, last + 1)))
    return Cost(flops, new * model.weights + read)


def least_seconds(cost: Cost, flops: float, read: float) -> tuple[float, str]:
    """The time below which the work cannot be done at so many FLOP/s and bytes/s, and which of the two says so."""
    by_product, by_memory = cost.flops / flops, cost.bytes / read
    return (by_product, "product") if by_product > by_memory else (by_memory, "memory")
