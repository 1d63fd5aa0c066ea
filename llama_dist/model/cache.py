"""The keys and values of running sequences, and the narrow view of a step that the layers see."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Span:
    """Tokens [start, start + length) of the sequence in `slot`, whose prompt has `prompt_len` tokens."""

    slot: int
    start: int
    length: int
    prompt_len: int

    @property
    def stop(self) -> int:
        return self.start + self.length


@dataclass(frozen=True)
class Batch:
    """The tokens of one forward pass, all sequences laid end to end.

    Example: a prompt of 3 tokens in slot 0 beside the 6th token of slot 1: spans (0, 0, 3), (1, 5, 1), positions
    [0, 1, 2, 5], slots [0, 0, 0, 1]. `lengths` is what rotary scaling may depend on, see rope.py.
    """

    tokens: torch.Tensor  # [n]
    positions: torch.Tensor  # [n]
    lengths: torch.Tensor  # [n]
    slots: torch.Tensor  # [n]
    spans: tuple[Span, ...]


def make_batch(rows: Sequence[tuple[Span, Sequence[int]]], device: torch.device) -> Batch:
    """Lay spans with their tokens end to end."""
    tokens: list[int] = []
    positions: list[int] = []
    lengths: list[int] = []
    slots: list[int] = []
    for span, ids in rows:
        assert len(ids) == span.length, f"span of {span.length} tokens came with {len(ids)}"
        tokens.extend(ids)
        positions.extend(range(span.start, span.stop))
        lengths.extend(max(p + 1, span.prompt_len) for p in range(span.start, span.stop))
        slots.extend([span.slot] * span.length)
    packed = torch.tensor([tokens, positions, lengths, slots], dtype=torch.int64).to(device)
    return Batch(packed[0], packed[1], packed[2], packed[3], tuple(span for span, _ in rows))


class KVCache:
    """One slot of `max_seq_len` positions for each of `max_batch_size` sequences, for this rank's KV heads."""

    def __init__(
        self,
        n_layers: int,
        max_batch_size: int,
        n_kv_heads: int,
        max_seq_len: int,
        head_dim: int,
        *,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        shape = (2, max_batch_size, n_kv_heads, max_seq_len, head_dim)
        self.layers = [torch.empty(shape, dtype=dtype, device=device) for _ in range(n_layers)]

    @property
    def n_bytes(self) -> int:
        return sum(layer.nbytes for layer in self.layers)

    def write(self, layer: int, batch: Batch, k: torch.Tensor, v: torch.Tensor) -> None:
        """Put k and v [n, n_kv_heads, head_dim] of the batch's tokens in their places."""
        keys, values = self.layers[layer]
        keys[batch.slots, :, batch.positions] = k
        values[batch.slots, :, batch.positions] = v

    def read(self, layer: int, span: Span) -> tuple[torch.Tensor, torch.Tensor]:
        """Views [n_kv_heads, span.stop, head_dim] of all keys and values of the span's sequence so far."""
        keys, values = self.layers[layer][:, span.slot, :, : span.stop]
        return keys, values
