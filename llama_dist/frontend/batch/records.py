"""The output as it lies on disk: which lines its records answer, and what of it is torn or there twice.

A record counts when it is whole: it begins with its id, ends as records end, and a line's end follows. Which line it
answers stands in its id, so nothing needs to be parsed.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from llama_dist.errors import ConfigError
from llama_dist.frontend.batch.survey import BLANK, DONE, FAILED

_HEAD = re.compile(rb'\{"id":"batch_req_[0-9a-f]{16}_(\d{1,12})","custom_id":"')
_ANSWERED = b',"error":null}\n'
_REFUSED = re.compile(rb'","response":null,"error":\{"code":".*"\}\}\n', re.DOTALL)


class Record(NamedTuple):
    """A line of the output, the line of the input it answers, and where it lies; `line` 0: it is no whole record."""

    line: int
    failed: bool
    start: int
    raw: bytes

    @property
    def stop(self) -> int:
        return self.start + len(self.raw)


def read_record(raw: bytes, start: int = 0) -> Record:
    """A line of the output, which begins at byte `start`."""
    head = _HEAD.match(raw)
    answered = raw.endswith(_ANSWERED)
    whole = (answered or _REFUSED.search(raw)) and b"\0" not in raw
    return Record(int(head[1]) if head and whole else 0, not answered, start, raw)


def records(path: Path) -> Iterator[Record]:
    """The lines of an output, damaged ones too. A file that is not there has none."""
    if not path.exists():
        return
    start = 0
    with open(path, "rb") as file:
        for raw in file:
            yield read_record(raw, start)
            start += len(raw)


@dataclass(frozen=True)
class Found:
    """What an output holds: `sound` bytes from its beginning, `size` in all, and records that must go between them."""

    size: int
    sound: int
    done: int
    failed: int
    bad: int
    """Damaged or repeated records that a sound one follows."""

    @property
    def torn(self) -> bool:
        """Whether its end must be cut off, at `sound`."""
        return self.size > self.sound


def take_stock(path: Path, marks: bytearray) -> Found:
    """Mark the lines that the output answers. ConfigError for a record of a line that the input does not have."""
    done = failed = bad = pending = sound = size = 0
    for record in records(path):
        size = record.stop
        if record.line >= len(marks) or (record.line and marks[record.line] == BLANK):
            raise ConfigError(
                f"{path} has a result for line {record.line}, which the input does not have; "
                "give the input it belongs to, or another --output_file"
            )
        if record.line == 0 or marks[record.line] in (DONE, FAILED):
            pending += 1
            continue
        marks[record.line] = FAILED if record.failed else DONE
        done += 1
        failed += record.failed
        sound = record.stop
        bad, pending = bad + pending, 0
    return Found(size, sound, done, failed, bad)


def in_order(path: Path) -> bool:
    """Whether the records follow the lines of the input already."""
    last = 0
    for record in records(path):
        if record.line <= last:
            return False
        last = record.line
    return True
