"""The status file: what a script reads to know how a job fares, valid JSON at every moment."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path
from typing import Any, Literal

State = Literal["running", "preempted", "failed", "completed"]

MAX_MESSAGE = 1000  # characters; keeps the file within one block of the disk


def replace_file(path: Path, data: bytes, durable: bool = False) -> None:
    """Put `data` in place of the file whole: a reader sees the old or the new. `durable`: also after a power cut.

    Raises OSError, and then the old file stands.
    """
    new = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}.tmp")
    try:
        with open(new, "wb") as f:
            f.write(data)
            f.flush()
            if durable:
                os.fsync(f.fileno())
        os.replace(new, path)
    except OSError:
        new.unlink(missing_ok=True)
        raise


def write_status(path: Path, status: dict[str, Any], last: bool = False) -> None:
    """Write the status. The `last` one must not be lost: where the disk has no room for a second file, it goes into the
    room of the first in one write. Raises OSError."""
    if status["message"] is not None:
        status = {**status, "message": status["message"][:MAX_MESSAGE]}
    data = json.dumps(status).encode() + b"\n"
    try:
        replace_file(path, data, durable=last)
    except OSError:
        if not last:
            raise
        _overwrite(path, data)


def _overwrite(path: Path, data: bytes) -> None:
    fd = os.open(path, os.O_WRONLY)
    try:
        # Blanks after JSON are JSON still, so what is left of a longer old text can go with the same write.
        os.pwrite(fd, data.ljust(os.fstat(fd).st_size), 0)
        os.fsync(fd)
    finally:
        os.close(fd)
