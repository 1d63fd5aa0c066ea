"""Results to stdout, whose reader may leave early; notes to stderr."""

from __future__ import annotations

import os
import sys

PIPE_CLOSED = 141  # the exit code of a program that SIGPIPE ends


class Output:
    """Writes results. Once stdout's reader is gone (`| head`), writes do nothing: the ranks still end together."""

    def __init__(self) -> None:
        self.exit_code = 0

    def write(self, text: str) -> None:
        """Text as it is, at once, with what stdout's encoding lacks replaced."""
        if self.exit_code:
            return
        encoding = sys.stdout.encoding or "utf-8"
        try:
            sys.stdout.write(text.encode(encoding, "replace").decode(encoding))
            sys.stdout.flush()
        except BrokenPipeError:
            self.exit_code = PIPE_CLOSED
            # What is left in the buffer must not raise again when the interpreter flushes it.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def note(text: str, end: str = "\n") -> None:
    """A line to stderr for whoever watches."""
    print(text, end=end, file=sys.stderr, flush=True)
