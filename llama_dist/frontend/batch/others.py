"""How far the other replicas are, read off the files they write."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

LOOK_EVERY = 2.0  # seconds
_FAILED = b',"response":null,"error":{"code":'


class Others:
    """Counts the records that are added to some files."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self._read = dict.fromkeys(paths, 0)
        self._due = time.monotonic() + LOOK_EVERY

    def news(self) -> tuple[int, int]:
        """Records since the last look, and how many of them are errors; looks every LOOK_EVERY only."""
        if time.monotonic() < self._due:
            return 0, 0
        done = failed = 0
        for path, start in self._read.items():
            try:
                with open(path, "rb") as file:
                    file.seek(start)
                    new = file.read()
            except OSError:  # not begun yet
                continue
            whole = new[: new.rfind(b"\n") + 1]
            self._read[path] = start + len(whole)
            done += whole.count(b"\n")
            failed += whole.count(_FAILED)
        self._due = time.monotonic() + LOOK_EVERY
        return done, failed
