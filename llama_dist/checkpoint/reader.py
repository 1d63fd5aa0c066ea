"""What every checkpoint format offers: slices of logical tensors.

Logical names are those of Meta's checkpoints: `tok_embeddings.weight`, `layers.N.attention.{wq,wk,wv,wo}.weight`
(and `.bias`), `layers.N.attention.{q_norm,k_norm}.weight`, `layers.N.feed_forward.{w1,w2,w3}.weight` (and `.bias`),
`layers.N.{attention_norm,ffn_norm}.weight`, `norm.weight`, `output.weight` (absent when embeddings are tied).
Rows of wq and wk (and q_norm, k_norm) are in the half-rotated order of Hugging Face: dimension i of a head pairs with
i + head_dim / 2. A reader of a format that pairs neighbours permutes as it reads.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from llama_dist.config import ModelConfig


@dataclass(frozen=True)
class TensorInfo:
    """Shape and dtype of one logical tensor, and the bytes it takes in the file."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    """What `read` gives: quantised storage is decoded to float32."""
    file_bytes: int


class Reader(Protocol):
    """An open checkpoint whose headers have been checked whole: every tensor there, none left over, shapes right."""

    format: str
    config: ModelConfig
    tensors: Mapping[str, TensorInfo]
    storage: Mapping[str, int]
    """Number of tensors by how they are stored, e.g. {"Q4_1": 210, "F32": 61}."""
    metadata: Mapping[str, Any]
    """A GGUF's key-value pairs, the tokenizer's among them; empty for other formats."""

    def read(self, name: str, dim: int = 0, start: int = 0, stop: int | None = None) -> Iterator[torch.Tensor]:
        """The range [start, stop) of `dim`, in pieces along dim 0 of at most 64 MiB, in order.

        A piece may be a view of mapped memory that the next step of the iterator lets go of: copy before going on.
        """
        ...

    def close(self) -> None: ...
