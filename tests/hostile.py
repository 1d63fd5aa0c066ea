"""What hostile cases share: the list of them, and how to cut a file short."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from tests import tiny

LLAMA = tiny.CASES["llama-meta"]

Maker = Callable[[Path], None]
CASES: dict[str, tuple[Maker, str]] = {}
"""What each makes in an empty folder, and a part of the message it must give."""


def case(message: str, name: str | None = None) -> Callable[[Maker], Maker]:
    def add(make: Maker) -> Maker:
        CASES[name or make.__name__] = (make, message)
        return make

    return add


def cut(path: Path, to: float) -> None:
    """Keep `to` bytes, or that part of them; below 0: leave so many off the end."""
    size = path.stat().st_size
    keep = size + to if to < 0 else size * to if isinstance(to, float) else to
    with open(path, "r+b") as file:
        file.truncate(int(keep))
