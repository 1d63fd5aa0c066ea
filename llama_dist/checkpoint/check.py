"""The headers of a checkpoint against what its config asks for: nothing missing, nothing left over, all of a shape."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from llama_dist.checkpoint.stored import Stored
from llama_dist.checkpoint.table import Logical
from llama_dist.config import ModelConfig
from llama_dist.errors import CheckpointError
from llama_dist.model.families import rotary_rows, tensor_shapes


def name_some(names: Iterable[str], limit: int = 3) -> str:
    """`a, b, c and 4 more`: the first few of a list, each cut to a readable length."""
    items = list(names)
    more = f" and {len(items) - limit} more" if len(items) > limit else ""
    return ", ".join(repr(item)[1:-1][:100] for item in items[:limit]) + more


def check_names(source: str, expected: Iterable[str], found: Iterable[str], by: str = "the config") -> None:
    """Both sets of names, as the files spell them, must be equal; CheckpointError names the difference.

    `by` is what the expected names follow from.
    """
    wanted, there = dict.fromkeys(expected), dict.fromkeys(found)
    missing = [name for name in wanted if name not in there]
    extra = [name for name in there if name not in wanted]
    faults = []
    if missing:
        faults.append(f"{len(missing)} of {len(wanted)} tensors missing: {name_some(missing)}")
    if extra:
        faults.append(f"{len(extra)} tensors that {by} does not account for: {name_some(extra)}")
    if faults:
        raise CheckpointError(f"{source}: {'; '.join(faults)}")


def check_type(source: str, name: str, stored: Stored, allowed: str = "F32, F16 or BF16") -> None:
    if stored.encoding is None:
        raise CheckpointError(f"{source}: tensor {name_some([name])} is stored as {stored.kind}, must be {allowed}")


def check_shape(source: str, name: str, found: tuple[int, ...], expected: tuple[int, ...]) -> None:
    if found != expected:
        raise CheckpointError(
            f"{source}: tensor {name_some([name])} has shape {list(found)}, the config asks for {list(expected)}"
        )


def match_whole(
    source: str,
    config: ModelConfig,
    found: Mapping[str, Stored],
    rename: Callable[[str], str],
    *,
    pairs: bool = False,
    allowed: str = "F32, F16 or BF16",
) -> dict[str, Logical]:
    """The logical tensors of a format that stores each in one piece.

    `found` has every tensor of the files by its own name, `rename` gives that name for a logical one, `pairs` says that
    rotated heads store pairs side by side. Raises CheckpointError naming the first tensors at fault.
    """
    shapes = tensor_shapes(config)
    check_names(source, (rename(name) for name in shapes), found)
    logical = {}
    for name, shape in shapes.items():
        stored = found[rename(name)]
        check_type(source, rename(name), stored, allowed)
        check_shape(source, rename(name), stored.shape, shape)
        logical[name] = Logical(shape, (stored,), pairs=config.head_dim if pairs and rotary_rows(name) else None)
    return logical
