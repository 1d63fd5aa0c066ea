"""Lines of a file descriptor, waited for with a timeout: a rank that waits for a human must not block."""

from __future__ import annotations

import codecs
import os
import select


class LineReader:
    """Lines of UTF-8 text from `fd`, read past Python's own buffers. A last line without an end counts."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._poller = select.poll()  # select.select knows descriptors below 1024 only
        self._poller.register(fd, select.POLLIN)
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._text = ""
        self._ended = False

    @property
    def ended(self) -> bool:
        """Whether everything has been read and handed out."""
        return self._ended and not self._text

    def poll(self, seconds: float) -> str | None:
        """The next line without its end, or None when none comes within `seconds`, or none any more (`ended`)."""
        line = self._next()
        if line is None and not self._ended and self._poller.poll(1000 * seconds):
            raw = os.read(self._fd, 1 << 16)
            self._ended = not raw
            self._text += self._decoder.decode(raw, final=not raw)
            line = self._next()
        return line

    def _next(self) -> str | None:
        line, end, rest = self._text.partition("\n")
        if not end and not (self._ended and self._text):
            return None
        self._text = rest
        return line.removesuffix("\r")
