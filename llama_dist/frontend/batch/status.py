"""The job's status file, also when its end is not of its own choosing."""

from __future__ import annotations

import json
import os
import socket
import time
from pathlib import Path
from typing import Any, Literal

from llama_dist.frontend.batch.job import Job
from llama_dist.frontend.monitor import Monitor
from llama_dist.frontend.options import BatchOptions
from llama_dist.frontend.status import State, write_status

TRY_AGAIN = 75  # EX_TEMPFAIL of sysexits.h


def status_path(output: Path | None) -> Path | None:
    return None if output is None else output.with_name(output.name + ".status.json")


def monitor_of(options: BatchOptions, job: Job) -> Monitor:
    report = None if options.report is None else Path(options.report)
    return Monitor(job.total, status_path(job.output), options.log_every, report, job.done, started_failed=job.failed)


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
