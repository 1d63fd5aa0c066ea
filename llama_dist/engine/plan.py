"""What a model needs of each rank's memory: arithmetic over its config and units. No torch, no GPU, no files.

Units that run out are filled with zeros, so that ranks hold alike many bytes, but for wo and w2 where weights are
packed or in panels: the last ranks have less of these. Example: a wk of 3 KV heads on 2 ranks that each read 2 of them
takes 2 heads on both, one of them held twice.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from llama_dist.config import ModelConfig
from llama_dist.model.families import tensor_shapes
from llama_dist.parallel.units import Units, cut_model, units_for
from llama_dist.quant.scheme import QUANTIZATIONS, Quantization, Scheme, packed_bytes

OVERHEAD = 10**9  # bytes a GPU loses to CUDA's context, communication buffers and the allocator's slack
HOST_SLACK = 300 * 10**6  # bytes of host memory while loading, beyond the shard and one slice
FLOAT32, FLOAT64 = 4, 8


@dataclass(frozen=True)
class Load:
    """How much is computed at once: `batch` sequences of up to `length` tokens each.

    `tick_tokens`: prompts that share a forward pass have so many tokens together, one longer prompt apart.
    `scored_rows`: prompt positions whose logits are held at once.
    """

    batch: int
    length: int
    tick_tokens: int
    scored_rows: int

    def resized(self, batch: int, length: int) -> Load:
        """Another number of sequences, of another length; a tick has a token for each of them."""
        return replace(self, batch=batch, length=length, tick_tokens=max(self.tick_tokens, batch))

    @property
    def forward_tokens(self) -> int:
        """The most tokens of one forward pass: prompts beside the newest token of every running sequence."""
        return min(self.batch * self.length, max(self.length, self.tick_tokens) + self.batch)


@dataclass(frozen=True)
class Terms:
    """Bytes that one rank needs of its device, by what they are for."""

    weights: int
    kv_cache: int
    logits: int
    activations: int
    overhead: int = OVERHEAD

    @property
    def total(self) -> int:
        return self.weights + self.kv_cache + self.logits + self.activations + self.overhead


def units_of(config: ModelConfig, n_ranks: int, asked: int | None) -> Units:
    """The model's units in a run that asks for `asked` of them (None: the default) on `n_ranks` ranks."""
    return cut_model(config.n_heads, config.n_kv_heads, config.hidden_dim, config.vocab_size, units_for(n_ranks, asked))


def rank_shapes(config: ModelConfig, units: Units, rank: int, n_ranks: int) -> dict[str, tuple[int, ...]]:
    """The shape of each logical tensor as `rank` holds it, zeros included. Norms and biases after a sum are whole."""
    heads = units.heads.of(rank, n_ranks).padded * config.head_dim
    kv = units.kv_heads(rank, n_ranks).padded * config.head_dim
    hidden, vocab = units.hidden.of(rank, n_ranks).padded, units.vocab.of(rank, n_ranks).padded
    rows = {"wq": heads, "wk": kv, "wv": kv, "w1": hidden, "w3": hidden, "tok_embeddings": vocab, "output": vocab}
    columns = {"wo": heads, "w2": hidden}
    shapes = {}
    for name, shape in tensor_shapes(config).items():
        layer = name.split(".")[-2]
        if layer in rows:
            shape = (rows[layer], *shape[1:])
        elif layer in columns and len(shape) == 2:
            shape = (shape[0], columns[layer])
        shapes[name] = shape
    return shapes


def weight_sizes(
    config: ModelConfig,
    units: Units,
    n_ranks: int,
    dtype_bytes: int,
    quantization: str | None = None,
    panels: bool = False,
    rank: int = 0,
) -> list[int]:
    """Bytes of each weight on `rank`; the first has the most, or as many as any.

    With `quantization` those of products are packed, and a tied output is a copy. `panels`: others lie in panels, as
    they do on some processors, filled up to whole blocks and groups. What is packed or lies in panels leaves out the
    zero units of wo and w2, which the last ranks hold otherwise.
    """
    shapes = rank_shapes(config, units, rank, n_ranks)
    exact = Scheme(8 * dtype_bytes, 0, 0)
    schemes = Quantization(exact, exact) if quantization is None else QUANTIZATIONS[quantization]
    if quantization is None and not panels:
        return [dtype_bytes * math.prod(shape) for shape in shapes.values()]
    if config.tied_embeddings:
        shapes["output.weight"] = shapes["tok_embeddings.weight"]
        if quantization is None:
            del shapes["tok_embeddings.weight"]
    cuts = {"wo": (units.heads, config.head_dim), "w2": (units.hidden, 1)}
    sizes = []
    for name, shape in shapes.items():
        layer = name.split(".")[-2]
        if len(shape) == 2 and layer != "tok_embeddings":
            unit, n_units = shape[1], 1
            if layer in cuts:
                cut, width = cuts[layer]
                unit, n_units = cut.unit * width, max(1, cut.held(rank, n_ranks))
            scheme = schemes.output if layer == "output" else schemes.layers
            sizes.append(packed_bytes(scheme, shape[0], unit, n_units))
        else:
            sizes.append(dtype_bytes * math.prod(shape))
    return sizes


def rank_weight_bytes(
    config: ModelConfig,
    units: Units,
    n_ranks: int,
    dtype_bytes: int,
    quantization: str | None = None,
    panels: bool = False,
) -> list[int]:
    """Bytes of weights that each rank allocates."""
    kinds = dtype_bytes, quantization, panels
    return [sum(weight_sizes(config, units, n_ranks, *kinds, rank)) for rank in range(n_ranks)]


def model_bytes(config: ModelConfig, dtype_bytes: int) -> int:
    """Bytes of the model's parameters, each once."""
    return dtype_bytes * sum(math.prod(shape) for shape in tensor_shapes(config).values())


def kv_bytes_per_token(config: ModelConfig, units: Units, n_ranks: int, dtype_bytes: int) -> int:
    """Bytes of keys and values that one position of one sequence takes on each rank."""
    return 2 * config.n_layers * units.kv_heads(0, n_ranks).padded * config.head_dim * dtype_bytes


def logits_bytes(config: ModelConfig, units: Units, n_ranks: int, dtype_bytes: int, load: Load) -> int:
    """Bytes of the logits of one step on each rank, and of drawing one token from them.

    Of every row: the ranks' parts and the same joined (one rank: just its own), a float32 copy, and one more for the
    exponentials of a sum over the vocabulary. Sorting one row takes about ten float64 or int64 arrays of its length.
    """
    rows = max(load.batch, min(load.scored_rows, load.length))
    copies = 1 if n_ranks == 1 else 2
    row = copies * units.vocab.padded(n_ranks) * dtype_bytes + 2 * FLOAT32 * config.vocab_size
    return rows * row + 10 * FLOAT64 * config.vocab_size


def activation_bytes(config: ModelConfig, units: Units, n_ranks: int, dtype_bytes: int, load: Load) -> int:
    """An estimate of the bytes of intermediate results in one layer, the largest moment of it, on each rank.

    The residual stream and the normed input live beside either attention (q, k, v, q and k once more in float32 while
    they are rotated, the heads' output) or the feed-forward (three arrays of the hidden size), or beside a norm's two
    float32 arrays. A sliding window adds a mask of the longest sequence.
    """
    q = units.heads.of(0, n_ranks).padded * config.head_dim
    kv = units.kv_heads(0, n_ranks).padded * config.head_dim
    hidden = units.hidden.of(0, n_ranks).padded
    attention = dtype_bytes * (3 * q + 2 * kv + config.dim) + 3 * FLOAT32 * max(q, kv)
    feed_forward = dtype_bytes * (3 * hidden + config.dim)
    norm = 2 * FLOAT32 * config.dim
    token = 2 * dtype_bytes * config.dim + max(attention, feed_forward, norm)
    mask = 0
    if config.sliding_window is not None and config.sliding_layers and config.sliding_window < load.length:
        mask = load.length**2 * (1 + dtype_bytes)
    return load.forward_tokens * token + mask


def rank_terms(
    config: ModelConfig, units: Units, n_ranks: int, dtype_bytes: int, load: Load, quantization: str | None = None
) -> Terms:
    """What each of `n_ranks` ranks needs for `load`."""
    return Terms(
        weights=max(rank_weight_bytes(config, units, n_ranks, dtype_bytes, quantization)),
        kv_cache=load.batch * load.length * kv_bytes_per_token(config, units, n_ranks, dtype_bytes),
        logits=logits_bytes(config, units, n_ranks, dtype_bytes, load),
        activations=activation_bytes(config, units, n_ranks, dtype_bytes, load),
    )


def loading_peak(
    config: ModelConfig, units: Units, n_ranks: int, dtype_bytes: int, quantization: str | None = None
) -> int:
    """The most host memory a rank takes while it loads on a CPU: its shard, its largest slice once more, and slack.

    With a GPU the shard lies there instead.
    """
    sizes = weight_sizes(config, units, n_ranks, dtype_bytes, quantization)
    return sum(sizes) + max(sizes) + HOST_SLACK


def waste(config: ModelConfig, units: Units, n_ranks: int) -> float:
    """The share of all ranks' parameters that is zero units or a copy of what another rank holds, 0 to 1."""
    held = sum(rank_weight_bytes(config, units, n_ranks, 1))
    return 1 - model_bytes(config, 1) / held


def largest(fits: Callable[[int], bool], most: int) -> int:
    """The largest number from 1 to `most` that fits, 0 if none does; what fits must fit when smaller."""
    low, high = 0, most + 1
    while high - low > 1:
        middle = (low + high) // 2
        if fits(middle):
            low = middle
        else:
            high = middle
    return low
