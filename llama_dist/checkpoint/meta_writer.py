"""Meta's format: `consolidated.NN.pth`, one a model-parallel rank, and `params.json`.

Matrices are cut as Meta's Llama 3 code holds them (llama-models, llama3/model.py): wq, wk, wv, w1, w3, output and the
embedding by rows, wo and w2 by columns, norms whole in every file. Rows of wq and wk pair neighbours.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from llama_dist.checkpoint.reader import Reader
from llama_dist.checkpoint.torch_zip import TorchZip
from llama_dist.checkpoint.writers import Advance, cast_pieces, dtype_of, raw_bytes
from llama_dist.config import ModelConfig
from llama_dist.errors import ConfigError
from llama_dist.model.families import tensor_shapes
from llama_dist.model.meta_params import feed_forward_dim, parse_meta_params

_BY_COLUMNS = ("wo", "w2")
_NOT_IN_PARAMS = ("family", "max_position", "tied_embeddings", "bos_id", "eos_ids")
"""What params.json does not say. The tokenizer has the ids, tied embeddings are written twice."""


@dataclass(frozen=True)
class Box:
    """The rows and columns of a whole tensor that one file holds; a vector has one column."""

    row0: int
    row1: int
    col0: int
    col1: int

    def shape(self, n_dims: int) -> tuple[int, ...]:
        rows, columns = self.row1 - self.row0, self.col1 - self.col0
        return (rows,) if n_dims == 1 else (rows, columns)


def multiples_for(dim: int, hidden: int) -> tuple[int, float | None]:
    """`multiple_of` and `ffn_dim_multiplier` by which Meta's rule gives `hidden`.

    Those of Meta's releases where they fit, e.g. (256, None) for 4096 -> 11008, else a multiplier in the middle of
    the range that rounds up to `hidden`. Example: 576 -> 1536: int(8 * 576 / 3) is 1536 already, (256, None).
    """
    for multiple in (256, 1024, 2048, 4096):
        for factor in (None, 1.3, 1.4, 1.5, 1.2, 1.05, 1.0):
            if feed_forward_dim(dim, multiple, factor) == hidden:
                return multiple, factor
    multiple = next(m for m in (256, 128, 64, 32, 16, 8, 4, 2, hidden) if hidden % m == 0)
    return multiple, (hidden + 1 - multiple / 2) / int(2 * (4 * dim) / 3)


def params_for(config: ModelConfig, mp_size: int) -> dict[str, Any]:
    """The contents of params.json.

    With more files than KV heads each head is in several files, which is told as that many heads (Llama 3.1 405B MP16).
    ConfigError names what Meta's format has no word for.
    """
    c = config
    multiple, factor = multiples_for(c.dim, c.hidden_dim)
    params: dict[str, Any] = {
        "dim": c.dim,
        "n_layers": c.n_layers,
        "n_heads": c.n_heads,
        "n_kv_heads": max(c.n_kv_heads, mp_size),
        "vocab_size": c.vocab_size,
        "multiple_of": multiple,
        "ffn_dim_multiplier": factor,
        "norm_eps": c.norm_eps,
        "rope_theta": c.rope_theta,
    }
    if factor is None:
        del params["ffn_dim_multiplier"]
    if c.rope_scaling is not None:
        params["use_scaled_rope"] = True
    if c.dim != c.n_heads * c.head_dim:
        raise _no_word_for("head_dim", c.head_dim, f"it must be dim / n_heads = {c.dim} / {c.n_heads}")
    told, meant = parse_meta_params(params, c.vocab_size), dataclasses.replace(c, n_kv_heads=params["n_kv_heads"])
    for field in dataclasses.fields(ModelConfig):
        value, heard = getattr(meant, field.name), getattr(told, field.name)
        if field.name not in _NOT_IN_PARAMS and value != heard:
            raise _no_word_for(field.name, value, f"a reader of params.json would take {heard}")
    return params


def _no_word_for(name: str, value: object, why: str) -> ConfigError:
    return ConfigError(f"--format meta cannot express {name} {value} ({why}); use --format hf")


def check_meta(config: ModelConfig, mp_size: int) -> None:
    """ConfigError where Meta's format cannot hold the model, or not in `mp_size` files; says which numbers work."""

    def works(n: int) -> bool:
        whole = config.n_heads % n == config.hidden_dim % n == config.vocab_size % n == 0
        return whole and (config.n_kv_heads % n == 0 or n % config.n_kv_heads == 0)

    params_for(config, 1)
    if mp_size < 1 or not works(mp_size):
        sizes = ", ".join(str(n) for n in range(1, config.n_heads + 1) if works(n))
        raise ConfigError(
            f"--model_parallel_size is {mp_size}, but {config.n_heads} heads, {config.n_kv_heads} KV heads, "
            f"{config.hidden_dim} hidden and {config.vocab_size} words can be cut into {sizes} files"
        )


def boxes(config: ModelConfig, name: str, shape: tuple[int, ...], mp_size: int) -> list[Box]:
    """What each of `mp_size` files holds of a tensor."""
    rows, columns = shape[0], shape[1] if len(shape) == 2 else 1
    module = name.split(".")[-2]
    if len(shape) == 1:
        return [Box(0, rows, 0, 1)] * mp_size
    if module in _BY_COLUMNS:
        width = columns // mp_size
        return [Box(0, rows, n * width, (n + 1) * width) for n in range(mp_size)]
    copies = max(1, mp_size // config.n_kv_heads) if module in ("wk", "wv") else 1
    height = rows * copies // mp_size
    return [Box(n // copies * height, (n // copies + 1) * height, 0, columns) for n in range(mp_size)]


def write_meta(reader: Reader, folder: Path, mp_size: int, dtype: torch.dtype | None, advance: Advance) -> None:
    """Every tensor read once, its pieces dealt to all files at once. `check_meta` has passed."""
    config = reader.config
    shapes = tensor_shapes(dataclasses.replace(config, tied_embeddings=False))
    plan = {name: boxes(config, name, shape, mp_size) for name, shape in shapes.items()}
    source = {name: name if name in reader.tensors else "tok_embeddings.weight" for name in shapes}
    (folder / "params.json").write_text(json.dumps(params_for(config, mp_size), indent=2) + "\n")
    with ExitStack() as stack:
        files = []
        for n in range(mp_size):
            held = {
                name: (plan[name][n].shape(len(shape)), dtype_of(reader, source[name], dtype))
                for name, shape in shapes.items()
            }
            files.append(stack.enter_context(TorchZip(folder / f"consolidated.{n:02d}.pth", held)))
        for name in shapes:
            pieces = cast_pieces(reader, source[name], dtype)
            if name.endswith((".wq.weight", ".wk.weight")):
                pieces = pair_neighbours(pieces, config.head_dim)
            _deal(pieces, plan[name], files, name, advance)


def _deal(pieces: Iterator[torch.Tensor], plan: list[Box], files: list[TorchZip], name: str, advance: Advance) -> None:
    with ExitStack() as stack:
        outs = [stack.enter_context(file.tensor(name)) for file in files]
        row = 0
        for piece in pieces:
            for box, out in zip(plan, outs, strict=True):
                start, stop = max(box.row0 - row, 0), min(box.row1 - row, len(piece))
                if start < stop:
                    part = piece[start:stop]
                    out.write(raw_bytes(part if part.ndim == 1 else part[:, box.col0 : box.col1]))
            row += len(piece)
            advance(piece.numel())


def pair_neighbours(pieces: Iterator[torch.Tensor], head_dim: int) -> Iterator[torch.Tensor]:
    """Rows of rotated heads from halves (i with i + head_dim / 2) to neighbours (2i with 2i + 1), in whole heads."""
    left: torch.Tensor | None = None
    for piece in pieces:
        rows = piece if left is None else torch.cat([left, piece])
        whole = len(rows) // head_dim * head_dim
        # A clone: what is kept must outlive the piece, which the reader takes back.
        left = rows[whole:].clone() if whole < len(rows) else None
        if whole:
            yield rows[:whole].view(-1, 2, head_dim // 2, rows.shape[1]).transpose(1, 2).reshape(whole, -1)
    assert left is None, f"{len(left)} rows that fill no head of {head_dim}"
