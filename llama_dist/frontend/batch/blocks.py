"""Blocks of lines, which the replicas of a job claim as they become free."""

from __future__ import annotations

import base64
import zlib
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from llama_dist.frontend.batch.survey import GRID, REPEATED, TODO, Ints, Survey

SHARES = 8  # blocks a replica finds, at least, where there are lines enough: the last ones end together


def block_size(n_left: int, n_replicas: int) -> int:
    """Lines in a block: GRID, or a power of two below it where few lines are left for several replicas."""
    if n_replicas == 1:
        return GRID
    size = GRID
    while size > 1 and size * n_replicas * SHARES > n_left:
        size //= 2
    return size


def open_blocks(marks: bytearray, size: int) -> Ints:
    """The blocks that have lines to be done. Block b begins with line 1 + b * size."""
    states = np.frombuffer(marks, np.uint8)[1:]
    left = np.flatnonzero((states == TODO) | (states == REPEATED))
    return np.unique(left // size).astype(np.int64)


def claimed_lines(survey: Survey, size: int, claim: Callable[[], int]) -> Iterator[tuple[int, bytes]]:
    """The lines to be done of the blocks that `claim`, which counts over the whole job, gives this replica."""
    blocks = open_blocks(survey.marks, size)
    while (turn := claim()) < len(blocks):
        first = 1 + int(blocks[turn]) * size
        for number, raw in survey.lines(first, first + size):
            if survey.marks[number] in (TODO, REPEATED):
                yield number, raw


def _pack(data: bytes | bytearray) -> str:
    return base64.b64encode(zlib.compress(data, 1)).decode("ascii")


def _unpack(text: str) -> bytes:
    return zlib.decompress(base64.b64decode(text))


def pack_survey(survey: Survey) -> dict[str, Any]:
    """A survey as JSON, for the other replicas."""
    return {
        "digest": survey.digest,
        "n_bytes": survey.n_bytes,
        "marks": _pack(survey.marks),
        "starts": _pack(survey.starts.tobytes()),
        "repeats": _pack(survey.repeats.tobytes()),
        "firsts": _pack(survey.firsts.tobytes()),
        "stamp": survey.stamp,
    }


def unpack_survey(data: dict[str, Any], path: Path) -> Survey:
    """The survey of the input, which lies at `path` here."""
    starts = array("q")
    starts.frombytes(_unpack(data["starts"]))
    repeats, firsts = (np.frombuffer(_unpack(data[name]), np.int64) for name in ("repeats", "firsts"))
    marks = bytearray(_unpack(data["marks"]))
    size, changed = data["stamp"]
    return Survey(path, data["digest"], data["n_bytes"], marks, starts, repeats, firsts, (size, changed))
