"""Bounded reads of files that strangers wrote.

Files are read with pread into a caller's buffer, not mapped: a rank's resident memory never grows by file pages, a file
cut short while it is open is an error instead of SIGBUS, and nothing has to be dropped again after each piece.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, NoReturn

from llama_dist.errors import CheckpointError

MAX_JSON = 4 * 2**20
"""Bytes of JSON worth parsing. The largest real header or index is below 1 MB, and a byte can cost 20 as an object."""


class File:
    """One open file: `name` for messages, `size` in bytes when it was opened. `close` may be called twice."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.name = path.name
        try:
            # O_NONBLOCK: opening a pipe that someone left here must not wait for a writer.
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as error:
            raise CheckpointError(f"cannot open {path}: {error.strerror}") from None
        if not os.path.isfile(path):
            self.close()
            raise CheckpointError(f"{path} is not a regular file")
        self.size = os.fstat(self._fd).st_size

    def read_into(self, buffer: memoryview, offset: int) -> None:
        """Fill `buffer` (bytes) from `offset`; a file that ends first is a CheckpointError."""
        done = 0
        while done < len(buffer):
            try:
                got = os.preadv(self._fd, [buffer[done:]], offset + done)
            except OSError as error:
                raise CheckpointError(f"cannot read {self.path}: {error.strerror}") from None
            if not got:
                raise CheckpointError(f"{self.path} ends at byte {offset + done}: truncated, fetch it again")
            done += got

    def read(self, offset: int, size: int) -> bytes:
        """`size` bytes from `offset`; more than the file has is an error before memory is taken."""
        if offset < 0 or size < 0 or offset + size > self.size:
            raise CheckpointError(
                f"{self.path} has {self.size} bytes, but bytes {offset} to {offset + size} are needed: "
                "truncated or damaged, fetch it again"
            )
        buffer = bytearray(size)
        self.read_into(memoryview(buffer), offset)
        return bytes(buffer)

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def parse_json(data: bytes, source: str) -> dict[str, Any]:
    """A JSON object from UTF-8 bytes: no NaN, no key twice, no nesting past Python's stack; else CheckpointError."""

    def no_constant(text: str) -> NoReturn:
        raise ValueError(f"{text} is not JSON")

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        table = dict(pairs)
        if len(table) != len(pairs):
            raise ValueError("a key appears twice")
        return table

    try:
        value = json.loads(data.decode("utf-8"), parse_constant=no_constant, object_pairs_hook=unique)
    except RecursionError:
        raise CheckpointError(f"{source} is no usable JSON: nested too deeply") from None
    except ValueError as error:
        reason = " ".join(str(error).split())[:120]
        raise CheckpointError(f"{source} is no usable JSON: {reason}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{source} holds a JSON {type(value).__name__}, must be an object")
    return value


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file of at most 4 MiB; CheckpointError names the file otherwise."""
    file = File(path)
    try:
        if file.size > MAX_JSON:
            raise CheckpointError(f"{path} has {file.size} bytes, more than a config or index can need ({MAX_JSON})")
        return parse_json(file.read(0, file.size), str(path))
    finally:
        file.close()
