"""One pass over the input before the job: its digest, where its lines are, and which repeat an earlier custom_id.

Memory is a byte a line for what becomes of it, and while the pass lasts eight more for a hash of its custom_id, twice.
Lines whose hash is not alone are read again and compared by their text.
"""

from __future__ import annotations

import hashlib
import os
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt

from llama_dist.errors import ConfigError, LlamaDistError
from llama_dist.frontend.batch.lines import MAX_LINE, custom_id_of, numbered_lines

GRID = 64  # lines between two whose place in the file is kept

TODO, DONE, FAILED, BLANK, REPEATED = range(5)
"""What is known of a line: to be done, answered, answered by an error, empty, or one that repeats a custom_id."""

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Survey:
    """The lines of an input. `marks[n]` is TODO, BLANK or REPEATED for line n; `marks[0]` stands for no line.

    `starts[k]` is the byte where line 1 + k * GRID begins. `repeats` and `firsts`: lines, rising, that repeat a
    custom_id, and the lines that had it first. `stamp`: size and time of the file, to notice a change.
    """

    path: Path
    digest: str
    n_bytes: int
    marks: bytearray
    starts: array[int]
    repeats: Ints
    firsts: Ints
    stamp: tuple[int, int]

    @property
    def n_lines(self) -> int:
        return len(self.marks) - 1

    def first_of(self, number: int) -> int:
        """The line whose custom_id this one repeats."""
        return int(self.firsts[np.searchsorted(self.repeats, number)])

    def lines(self, first: int, last: int) -> Iterator[tuple[int, bytes]]:
        """(number, bytes) of the lines from `first` up to, not including, `last`."""
        block = (first - 1) // GRID
        with open_input(self.path) as file:
            if stamp_of(file) != self.stamp:
                raise LlamaDistError(f"{self.path} has changed while the job ran; the results so far stand")
            file.seek(self.starts[block])
            for number, raw in numbered_lines(file.readline, 1 + block * GRID):
                if number >= last:
                    return
                if number >= first:
                    yield number, raw


def open_input(path: Path) -> BinaryIO:
    """The file, for reading. ConfigError where that cannot be."""
    try:
        return open(path, "rb")
    except OSError as err:
        raise ConfigError(f"--input_file {path} cannot be read: {err.strerror}") from None


def stamp_of(file: BinaryIO) -> tuple[int, int]:
    status = os.fstat(file.fileno())
    return status.st_size, status.st_mtime_ns


def survey(path: Path) -> Survey:
    """Read the input once. ConfigError where it cannot be read."""
    hasher = hashlib.blake2b(digest_size=16)
    marks, starts, hashes = bytearray(1), array("q"), array("q", [0])
    n_bytes = 0
    with open_input(path) as file:
        stamp = stamp_of(file)
        try:
            for number, raw in numbered_lines(file.readline):
                if number % GRID == 1:
                    starts.append(n_bytes)
                hasher.update(raw)
                n_bytes = n_bytes + len(raw) if len(raw) <= MAX_LINE else file.tell()
                if raw.isspace():
                    marks.append(BLANK)
                    hashes.append(0)
                else:
                    marks.append(TODO)
                    # Only picks what is compared below; so it may differ from process to process.
                    hashes.append(hash(custom_id_of(raw, number)) or 1)
        except OSError as err:
            raise ConfigError(f"--input_file {path} cannot be read: {err.strerror}") from None
    found = Survey(path, hasher.hexdigest(), n_bytes, marks, starts, _none(), _none(), stamp)
    repeats, firsts = _repeats(found, _alike(hashes))
    for number in repeats:
        marks[number] = REPEATED
    return Survey(path, found.digest, n_bytes, marks, starts, repeats, firsts, stamp)


def _none() -> Ints:
    return np.empty(0, np.int64)


def _alike(hashes: array[int]) -> Ints:
    """Lines, rising, whose hash another line has too."""
    values = np.frombuffer(hashes, np.int64)[1:]
    ranked = np.sort(values)
    doubles = np.unique(ranked[1:][ranked[1:] == ranked[:-1]])
    doubles = doubles[doubles != 0]  # of empty lines
    del ranked
    return np.flatnonzero(np.isin(values, doubles)) + 1 if len(doubles) else _none()


def _repeats(found: Survey, candidates: Ints) -> tuple[Ints, Ints]:
    """Of lines that may repeat a custom_id those that do, rising, and the first line with it."""
    first: dict[bytes, int] = {}
    repeats, firsts = array("q"), array("q")
    for number, raw in _reread(found, candidates):
        key = hashlib.blake2b(custom_id_of(raw, number).encode("utf-8", "surrogatepass"), digest_size=16).digest()
        if key in first:
            repeats.append(number)
            firsts.append(first[key])
        else:
            first[key] = number
    return np.array(repeats, np.int64), np.array(firsts, np.int64)


def _reread(found: Survey, numbers: Ints) -> Iterator[tuple[int, bytes]]:
    if len(numbers) * 100 > found.n_lines:  # in one go where they lie close
        wanted = np.zeros(found.n_lines + 1, np.bool_)
        wanted[numbers] = True
        yield from ((n, raw) for n, raw in found.lines(1, found.n_lines + 1) if wanted[n])
    else:
        for number in numbers.tolist():
            yield from found.lines(number, number + 1)
