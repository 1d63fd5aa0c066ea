"""One job at a time for one output, be it one task or several that share it."""

from __future__ import annotations

import fcntl
import os
import socket
import time
from pathlib import Path

from llama_dist.errors import ConfigError

SHARED_WAIT = 3.0  # seconds: a task that leaves tries for a moment whether it is the last


class Lock:
    """A lock on `PATH.lock`, held until `release` or the process's end, however it ends.

    `shared`: together with other tasks that share the output, but with no job that does not. ConfigError, naming the
    holder, where another job has it.
    """

    def __init__(self, output: Path, shared: bool = False) -> None:
        self.path = output.with_name(output.name + ".lock")
        self._shared = shared
        until = time.monotonic() + (SHARED_WAIT if shared else 0.0)
        while True:
            try:
                self._fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            except OSError as err:
                raise ConfigError(f"--output_file {output} cannot be written: {err.strerror}") from None
            try:
                fcntl.flock(self._fd, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
            except OSError:
                holder = os.pread(self._fd, 200, 0).decode("utf-8", "replace").strip() or "another process"
                os.close(self._fd)
                if time.monotonic() < until:
                    time.sleep(0.05)
                    continue
                alone = ", which does not share it" if shared else ""
                raise ConfigError(f"{output} is being written by {holder}{alone}; wait for that job to end") from None
            if self._is_named():
                break
            os.close(self._fd)  # its holder ended, and took the name away, between our opening and our locking it
        self._sign()

    def _sign(self) -> None:
        who = f"pid {os.getpid()} on host {socket.gethostname()}"
        text = f"tasks with --shared_output, the last of them {who}\n" if self._shared else f"{who}\n"
        os.ftruncate(self._fd, 0)
        os.pwrite(self._fd, text.encode(), 0)

    def _is_named(self) -> bool:
        try:
            named = os.stat(self.path)
        except FileNotFoundError:
            return False
        mine = os.fstat(self._fd)
        return (named.st_dev, named.st_ino) == (mine.st_dev, mine.st_ino)

    def share(self) -> None:
        """Let other tasks in from now on."""
        fcntl.flock(self._fd, fcntl.LOCK_SH)
        self._shared = True
        self._sign()

    def _is_last(self) -> bool:
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            return False
        return True

    def release(self) -> None:
        if self._fd >= 0:
            if not self._shared or self._is_last():
                self.path.unlink(missing_ok=True)
            os.close(self._fd)
            self._fd = -1
