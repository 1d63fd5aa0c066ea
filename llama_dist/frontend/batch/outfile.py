"""Changing the output so that whatever moment ends the process, what stands on disk is whole or can be made so.

Appends are synced before they count. Everything else is a new file, synced and put in the old one's place in one step;
a file left half written is named `.tmp` and written anew the next time.
"""

from __future__ import annotations

import contextlib
import os
import re
from array import array
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Protocol

from llama_dist.errors import LlamaDistError
from llama_dist.frontend.batch.records import Record, records
from llama_dist.frontend.output import Output

CHUNK = 1 << 20  # bytes merged at a time


class Sink(Protocol):
    """Where records go. `gone`: nobody reads them any more."""

    @property
    def gone(self) -> bool: ...

    def append(self, data: bytes | bytearray) -> None: ...

    def close(self) -> None: ...


class Appender:
    """A file that records are added to. What `append` has returned from survives a kill and a power cut."""

    gone = False

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
            self._size = os.fstat(self._fd).st_size
            sync_folder(path)
        except OSError as err:
            raise unwritable(path, err) from None

    def append(self, data: bytes | bytearray) -> None:
        """Write and sync. LlamaDistError where the disk takes no more; the file then ends as it did before."""
        rest = memoryview(bytes(data))
        try:
            while rest:
                rest = rest[os.write(self._fd, rest) :]
            os.fsync(self._fd)
        except OSError as err:
            with contextlib.suppress(OSError):  # the next run cuts a torn record off too
                os.ftruncate(self._fd, self._size)
            raise unwritable(self.path, err) from None
        self._size += len(data)

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


class Standard:
    """Records to stdout. Once its reader has left there is no use in going on."""

    def __init__(self) -> None:
        self._output = Output()

    @property
    def gone(self) -> bool:
        return self._output.exit_code != 0

    @property
    def exit_code(self) -> int:
        return self._output.exit_code

    def append(self, data: bytes | bytearray) -> None:
        self._output.write(data.decode("ascii"))

    def close(self) -> None:
        pass


def unwritable(path: Path, err: OSError) -> LlamaDistError:
    return LlamaDistError(f"cannot write {path}: {err.strerror}; the results written before it stand")


def sync_folder(path: Path) -> None:
    """Make a new or renamed file's name last."""
    fd = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def replace_with(path: Path, pieces: Iterable[bytes]) -> None:
    """Put a new file of `pieces` in the place of `path`, with its permissions, in one step."""
    new = path.with_name(path.name + ".tmp")
    try:
        with open(new, "wb") as file:
            if path.exists():
                os.fchmod(file.fileno(), path.stat().st_mode & 0o7777)
            for piece in pieces:
                file.write(piece)
            file.flush()
            os.fsync(file.fileno())
        os.replace(new, path)
        sync_folder(path)
    except OSError as err:
        raise unwritable(path, err) from None


def keep_mode(new: Path, old: Path) -> None:
    """Give a file the permissions of the one it is to replace, if there is one."""
    if old.exists():
        os.chmod(new, old.stat().st_mode & 0o7777)


def cut(path: Path, size: int) -> None:
    """Cut a torn end off."""
    try:
        with open(path, "r+b") as file:
            file.truncate(size)
            os.fsync(file.fileno())
    except OSError as err:
        raise unwritable(path, err) from None


def keep(path: Path, wanted: Callable[[Record], bool]) -> None:
    """Keep the wanted records only."""
    replace_with(path, (record.raw for record in records(path) if record.line and wanted(record)))


def keep_sound(path: Path, n_lines: int) -> None:
    """Keep the first whole record of each line."""
    seen = bytearray(n_lines + 1)

    def first(record: Record) -> bool:
        new = not seen[record.line]
        seen[record.line] = 1
        return new

    keep(path, first)


def put_in_order(path: Path, n_lines: int) -> None:
    """Rewrite the output in the order of the input's lines. Holds eight bytes a line."""
    starts = array("q", bytes(8 * (n_lines + 1)))
    for record in records(path):
        starts[record.line] = record.start + 1

    def ordered() -> Iterator[bytes]:
        with open(path, "rb") as file:
            for start in starts[1:]:
                if start:
                    file.seek(start - 1)
                    yield file.readline()

    replace_with(path, ordered())


def part_path(path: Path, owner: int | str) -> Path:
    """Where the results of a replica (its number), or of one of several tasks (`t` and 16 hex digits), wait."""
    return path.with_name(f"{path.name}.part-{owner}")


def parts_of(path: Path) -> list[Path]:
    """The parts that wait to be merged, by replica."""
    head = f"{path.name}.part-"
    owners = [p.name[len(head) :] for p in path.parent.iterdir() if p.name.startswith(head)]
    wanted = [owner for owner in owners if re.fullmatch(r"\d{1,9}|t[0-9a-f]{16}", owner)]
    return [path.with_name(head + owner) for owner in sorted(wanted, key=lambda owner: (len(owner), owner))]


def merge_parts(path: Path, n_lines: int) -> None:
    """Add every part's records to the output, each line once, then drop the parts.

    May be ended at any moment and called again: a part goes only when all it has is on disk, and lines that the output
    has are passed over. The output's own torn end must be cut off before.
    """
    parts = parts_of(path)
    if not parts:
        return
    seen = bytearray(n_lines + 1)
    for record in records(path):
        seen[record.line] = 1
    output = Appender(path)
    try:
        for part in parts:
            buffer = bytearray()
            for record in records(part):
                if record.line and record.line <= n_lines and not seen[record.line]:
                    seen[record.line] = 1
                    buffer += record.raw
                    if len(buffer) >= CHUNK:
                        output.append(buffer)
                        buffer.clear()
            output.append(buffer)
            os.unlink(part)
    except OSError as err:
        raise unwritable(path, err) from None
    finally:
        output.close()
