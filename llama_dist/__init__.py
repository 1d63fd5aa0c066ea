"""llama_dist: any Llama-family checkpoint, on any number of ranks, the same text every time."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llama_dist.generation import Dialog, Llama, Message

__version__ = "0.1.0"
__all__ = ["Dialog", "Llama", "Message", "__version__"]


def __getattr__(name: str) -> Any:
    # Late, so that `llama_dist --help` and a mistyped flag do not wait for torch.
    if name in ("Dialog", "Llama", "Message"):
        from llama_dist import generation

        return getattr(generation, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
