"""The job's status file, also when its end is not of its own choosing."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
from pathlib import Path
from typing import Any, Literal

from llama_dist.frontend.batch.cards import others_alive
from llama_dist.frontend.batch.job import Job
from llama_dist.frontend.batch.sharing import folder_of
from llama_dist.frontend.monitor import Monitor
from llama_dist.frontend.options import BatchOptions
from llama_dist.frontend.status import State, write_status

TRY_AGAIN = 75  # EX_TEMPFAIL of sysexits.h
OVERALL_EVERY = 10.0  # seconds between two copies of a task's status for all


def status_path(output: Path | None, task: str | None = None) -> Path | None:
    """The job's status file, or that of one `task` of several."""
    middle = "" if task is None else f".task-{task}"
    return None if output is None else output.with_name(f"{output.name}{middle}.status.json")


def monitor_of(options: BatchOptions, job: Job) -> Monitor:
    report = None if options.report is None else Path(options.report)
    path = status_path(job.output, None if job.task is None else job.task.label)
    fingerprint = job.names.system_fingerprint
    return Monitor(
        job.total, path, options.log_every, report, job.done, started_failed=job.failed, fingerprint=fingerprint
    )


class Overall:
    """The status of a job that several tasks share: a copy of this one's own, where that is true of all of them."""

    def __init__(self, output: Path, task: str) -> None:
        self._folder, self._task = folder_of(output), task
        self._own, self._path = status_path(output, task), status_path(output)
        self._due = 0.0
        self.copy()

    def copy(self, **changed: Any) -> None:
        """Copy the task's own status, with what has changed since."""
        assert self._own is not None and self._path is not None, "a shared output is a file"
        with contextlib.suppress(OSError, ValueError):  # as the task's own, it is no reason to stop
            status = {**json.loads(self._own.read_bytes()), **changed}
            write_status(self._path, status, last=status["state"] != "running")

    def counted(self) -> tuple[int, int] | None:
        """What the task that merged has counted: results, and errors among them."""
        assert self._path is not None
        with contextlib.suppress(OSError, ValueError, KeyError):
            status = json.loads(self._path.read_bytes())
            if status["state"] == "completed":
                return status["done"], status["failed"]
        return None

    def tick(self) -> None:
        """Copy it now and then."""
        if time.monotonic() >= self._due and self._folder.exists():  # else the job has just been completed
            self._due = time.monotonic() + OVERALL_EVERY
            self.copy()

    def end(self, complete: bool) -> None:
        """The task has ended: so has the job where it is complete, or where no other task is at work."""
        if complete or not others_alive(self._folder, self._task):
            self.copy()


def note_unread(path: Path | None) -> None:
    """The job ends before all of its input was read: what an earlier run counted stands."""
    if path is None:
        return
    try:
        before = json.loads(path.read_bytes())
    except (OSError, ValueError):
        before = {"done": 0, "failed": 0, "total": None, "prompt_tokens": 0, "new_tokens": 0, "tokens_per_second": 0.0}
    _write_end(path, before, "preempted", "told to stop before all of the input was read")


def _write_end(path: Path, before: dict[str, Any], state: State, message: str) -> None:
    ours = {"state": state, "message": message, "updated": time.time()}
    write_status(path, {**before, **ours, "pid": os.getpid(), "host": socket.gethostname()}, last=True)


def note_end(monitor: Monitor | None, path: Path | None, message: str, code: int) -> None:
    """The job ends at once, and this rank is the one to say so: rank 0, who has the monitor, or another."""
    state: Literal["preempted", "failed"] = "preempted" if code == TRY_AGAIN else "failed"
    if monitor is not None:
        monitor.close(state, message, hurry=True)
        return
    if path is None:
        return
    try:
        status = json.loads(path.read_bytes())
        if status["state"] != "running":  # another rank has said it already
            return
        _write_end(path, status, state, message)
    except (OSError, ValueError):  # another host's disk, or no status yet: the line on stderr has to do
        pass
