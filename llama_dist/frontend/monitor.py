"""What a person or a script watches while a batch job runs and after it: bar or log, status file, summary, report."""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

from llama_dist.engine.stats import EngineStats
from llama_dist.frontend.output import note
from llama_dist.frontend.progress import Standing, progress_for
from llama_dist.frontend.report import check_report, write_report
from llama_dist.frontend.status import State, write_status
from llama_dist.frontend.summary import summarize
from llama_dist.frontend.tally import Finished, Tally

__all__ = ["Finished", "Monitor"]

log = logging.getLogger("llama_dist")

STATUS_EVERY = 1.0  # seconds
CLOSE_WAIT = 0.5  # seconds `close` waits for a tick that hangs in another thread, such as on a stopped terminal


class Monitor:
    """Watches one job from the rank that writes its output.

    `total`: requests in the job, None where that is not known yet; may be set later. `started_done` of them, with
    `started_failed` errors among those, were answered by earlier runs. `log_every`: seconds between two lines in a log,
    0 for none. `report`: a page to write at the end. `fingerprint`: what the results of a reproducible job carry.
    ConfigError where the report cannot work.
    """

    def __init__(
        self,
        total: int | None,
        status_path: Path | None,
        log_every: float,
        report: Path | None,
        started_done: int = 0,
        clock: Callable[[], float] = time.monotonic,
        started_failed: int = 0,
        fingerprint: str | None = None,
    ) -> None:
        if report is not None:
            check_report(report)
        self.total = total
        self.status_path = status_path
        self.report = report
        self.fingerprint = fingerprint
        self.started_done = self._found_done = started_done
        self.started_failed = started_failed
        self.tally = Tally()
        self._clock = clock
        self._began = clock()
        self._wall_began = time.time()
        self._lock = threading.Lock()
        self._closed = False
        self._warned = False
        self._progress = progress_for(self.standing(), log_every)
        self._progress_due = self._began + self._progress.every
        self._status_due = self._began + STATUS_EVERY
        self._write_status("running", None)

    def tick(self, stats: EngineStats, finished: Sequence[Finished]) -> None:
        """Take in a tick of the engine and the requests that got their answer since the last. Costs microseconds."""
        with self._lock:
            if self._closed:
                return
            now = self._clock()
            self.tally.add(now - self._began, stats, finished)
            if now >= self._progress_due:
                self._progress_due = now + self._progress.every
                self._progress.show(self.standing())
            if now >= self._status_due:
                self._status_due = now + STATUS_EVERY
                self._write_status("running", None)

    def count_others(self, done: int, failed: int) -> None:
        """Others have answered so many more requests. What two have answered both is no more than the total."""
        if self.total is not None:
            done = min(done, self.total - self.started_done - self.tally.done)
        self.started_done += done
        self.started_failed += failed

    def settle(self, done: int, failed: int) -> None:
        """So many requests have their answer in all, and so many of them an error."""
        self.started_done = done - self.tally.done
        self.started_failed = failed - self.tally.failed

    def close(
        self, state: Literal["completed", "preempted", "failed"], message: str | None = None, hurry: bool = False
    ) -> None:
        """The job has ended: last status, summary on stderr, report. Only the first call counts; any thread may call.

        `hurry` leaves out the report, which takes seconds; status and summary take milliseconds.
        """
        held = self._lock.acquire(timeout=CLOSE_WAIT)
        try:
            if self._closed:
                return
            self._closed = True
            if state == "completed" and self.total is None:
                self.total = self.started_done + self.tally.done
            self._write_status(state, message, last=True)
            if not held:
                return  # the thread that holds the lock may hold the terminal too
            self.tally.end()
            self._progress.close(self.standing())
        finally:
            if held:
                self._lock.release()
        wall = self._clock() - self._began
        summary = summarize(self.tally, state, message, self.total, self.started_done, wall, self.fingerprint)
        note(summary.text)
        if self.report is not None and not hurry:
            try:
                write_report(self.report, self._title(), summary, self.tally)
            except Exception as err:  # no plot is worth a job's exit code
                log.warning("%s is not written: %s: %s", self.report, type(err).__name__, err)

    def standing(self) -> Standing:
        """The job now."""
        tally, lately = self.tally, self.tally.lately
        done = self.started_done + tally.done
        left = None
        since = done - self._found_done  # by all replicas
        if self.total is not None and since:
            left = (self.total - done) * tally.now.seconds / since
        return Standing(
            done=done,
            failed=self.started_failed + tally.failed,
            total=self.total,
            running=tally.running,
            waiting=tally.stats.waiting,
            prompt_rate=lately.prompt_tokens,
            new_rate=lately.new_tokens,
            kv=tally.kv,
            left=left,
        )

    def _write_status(self, state: State, message: str | None, last: bool = False) -> None:
        if self.status_path is None:
            return
        tally = self.tally
        rate = tally.overall if last else tally.lately
        status = {
            "state": state,
            "done": self.started_done + tally.done,
            "failed": self.started_failed + tally.failed,
            "total": self.total,
            "prompt_tokens": tally.stats.prompt_tokens,
            "new_tokens": tally.stats.new_tokens,
            "tokens_per_second": round(rate.new_tokens, 2),
            "updated": time.time(),
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "message": message,
        }
        try:
            write_status(self.status_path, status, last)
        except OSError as err:  # the job's own output decides whether it can go on
            if not self._warned:
                log.warning("status file %s is not up to date: %s", self.status_path, err.strerror or err)
            self._warned = True

    def _title(self) -> str:
        began = time.strftime("%Y-%m-%d %H:%M:%S %z", time.localtime(self._wall_began))
        name = self.status_path.name.removesuffix(".status.json") if self.status_path is not None else "batch job"
        return f"{name}, begun {began} on {socket.gethostname()}"
