"""One job at a time for one output."""

from __future__ import annotations

import fcntl
import os
import socket
from pathlib import Path

from llama_dist.errors import ConfigError


class Lock:
    """An exclusive lock on `PATH.lock`, held until `release` or the process's end, however it ends.

    ConfigError, naming the holder, where another job has it.
    """

    def __init__(self, output: Path) -> None:
        self.path = output.with_name(output.name + ".lock")
        while True:
            try:
                self._fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            except OSError as err:
                raise ConfigError(f"--output_file {output} cannot be written: {err.strerror}") from None
            try:
                fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                holder = os.pread(self._fd, 200, 0).decode("utf-8", "replace").strip() or "another process"
                os.close(self._fd)
                raise ConfigError(f"{output} is being written by {holder}; wait for that job to end") from None
            if self._is_named():
                break
            os.close(self._fd)  # its holder ended, and took the name away, between our opening and our locking it
        os.ftruncate(self._fd, 0)
        os.pwrite(self._fd, f"pid {os.getpid()} on host {socket.gethostname()}\n".encode(), 0)

    def _is_named(self) -> bool:
        try:
            named = os.stat(self.path)
        except FileNotFoundError:
            return False
        mine = os.fstat(self._fd)
        return (named.st_dev, named.st_ino) == (mine.st_dev, mine.st_ino)

    def release(self) -> None:
        if self._fd >= 0:
            self.path.unlink(missing_ok=True)
            os.close(self._fd)
            self._fd = -1
