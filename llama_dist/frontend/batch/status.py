"""The job's status file, also when its end is not of its own choosing."""

from __future__ import annotations

import json
import os
import socket
import time
from pathlib import Path
from typing import Literal

from llama_dist.frontend.batch.job import Job
from llama_dist.frontend.monitor import Monitor
from llama_dist.frontend.options import BatchOptions
from llama_dist.frontend.status import write_status

TRY_AGAIN = 75  # EX_TEMPFAIL of sysexits.h


def status_path(output: Path | None) -> Path | None:
    return None if output is None else output.with_name(output.name + ".status.json")


def monitor_of(options: BatchOptions, job: Job) -> Monitor:
    report = None if options.report is None else Path(options.report)
    return Monitor(job.total, status_path(job.output), options.log_every, report, job.done, started_failed=job.failed)


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
        ours = {"state": state, "message": message, "updated": time.time()}
        write_status(path, {**status, **ours, "pid": os.getpid(), "host": socket.gethostname()}, last=True)
    except (OSError, ValueError):  # another host's disk, or no status yet: the line on stderr has to do
        pass
