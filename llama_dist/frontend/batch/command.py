"""The `batch` command, from the checked flags to the exit code, the same on every rank."""

from __future__ import annotations

import dataclasses
import datetime
import functools
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from llama_dist.engine.session import Checked, check_run, open_session
from llama_dist.errors import ConfigError, Halted
from llama_dist.frontend.batch.background import Background
from llama_dist.frontend.batch.blocks import pack_survey, unpack_survey
from llama_dist.frontend.batch.drain import Drain, seconds_left
from llama_dist.frontend.batch.job import Job, conclude, is_stream, open_job, output_path
from llama_dist.frontend.batch.merging import conclude_shared
from llama_dist.frontend.batch.prompts import Encoder
from llama_dist.frontend.batch.records import Found
from llama_dist.frontend.batch.results import Names
from llama_dist.frontend.batch.serving import Served, Share, serve_share
from llama_dist.frontend.batch.sharing import Task, task_label
from llama_dist.frontend.batch.status import TRY_AGAIN, Overall, monitor_of, note_end, note_unread, status_path
from llama_dist.frontend.inbox import next_message
from llama_dist.frontend.monitor import Monitor
from llama_dist.frontend.options import BatchOptions
from llama_dist.frontend.report import check_report
from llama_dist.parallel.launch import read_launch
from llama_dist.parallel.world import World, join, leave, model_parallel_size
from llama_dist.text.chat import pick_chat_format

EARLY_BYTES = 2**30
"""Files up to here are read before the ranks meet, so that a refusal ends the job at once; reading more could take
longer than the others wait, so it is done while they are kept in touch."""
EARLY_STRICT_BYTES = 2**24
"""The same with --strict, which tokenizes all of it."""


@dataclass
class Start:
    """What a rank has when the work begins. `job`: rank 0's, None elsewhere and until the input has been read."""

    options: BatchOptions
    checked: Checked
    encoder: Encoder
    job: Job | None
    left: float | None
    at: float = field(default_factory=time.monotonic)
    copy: IO[bytes] | None = None
    """What came from the pipe."""

    def drain(self, world: World) -> Drain:
        left = None if self.left is None else max(0.0, self.left - (time.monotonic() - self.at))
        return Drain(world.watch.draining, left, self.options.grace)


def prepare(options: BatchOptions) -> Callable[[], int]:
    """Check flags, checkpoint, input and what stands of the output; the work comes back. Rank 0 reads all input."""
    launch = read_launch()
    left = seconds_left(options.deadline, options.grace)
    output_path(options)
    if options.report is not None:
        check_report(Path(options.report))
    # Only rank 0 needs the files for sure, but its neighbours can see too that one is missing, and end with it.
    streamed = is_stream(options.input_file) if launch.rank == launch.local_rank else options.input_file == "-"
    if model_parallel_size(options.run, launch) < launch.size and (streamed or options.output_file == "-"):
        raise ConfigError("- and pipes serve one copy of the model only; with replicas give files")
    if options.shared_output and streamed:
        raise ConfigError(f"--shared_output needs files that every task can open; {options.input_file} is a pipe")
    checked = check_run(options.run)
    encoder = make_encoder(options, checked)
    job = None
    if (
        launch.rank == 0
        and not streamed
        # torchrun ends the other ranks with the one that refuses; srun's hear of it once they have met
        and launch.launcher in ("torchrun", "alone")
        and (launch.size == 1 or _n_bytes(options) <= (EARLY_STRICT_BYTES if options.strict else EARLY_BYTES))
        # where others are about to come or go, that may take a moment
        and (launch.size == 1 or not options.shared_output)
    ):
        job = open_job(options, checked, encoder, Path(options.input_file).resolve())
    return functools.partial(run, Start(options, checked, encoder, job, left))


def _n_bytes(options: BatchOptions) -> int:
    """Bytes of the input and of what stands of the output, all of which are read before the job begins."""
    paths = [Path(options.input_file), Path(options.output_file)]
    return sum(path.stat().st_size for path in paths if path.is_file())


def make_encoder(options: BatchOptions, checked: Checked) -> Encoder:
    """How prompts become ids; a checkpoint without a chat format can still complete texts."""
    config = checked.reader.config
    chat_format, no_chat = None, ""
    try:
        chat_format = pick_chat_format(checked.tokenizer, config.family, options.run.chat_format)
    except ConfigError as err:
        if options.run.chat_format is not None:
            raise
        no_chat = str(err)
    return Encoder(checked.tokenizer, config.vocab_size, checked.max_seq_len, chat_format, no_chat)


def run(start: Start) -> int:
    """Load, serve the lines that are to be done, bring the output to its end. Every rank calls it alike."""
    options = start.options
    world = join(options.run)
    world.watch.drain_on_signals()
    plan = next_message(world, _planner(start, world))
    path = output_path(options)
    if "finished" not in plan:  # told to stop before all of the input was read
        if world.rank == 0:
            note_unread(status_path(path, task_label() if options.shared_output else None))
        leave(world)
        return TRY_AGAIN
    monitor = monitor_of(options, start.job) if start.job is not None else None
    overall = Overall(path, plan["task"]) if monitor is not None and path is not None and plan["task"] else None
    world.watch.at_finish(_last_words(monitor, status_path(path, plan["task"]), overall))
    served = Served(0, True)
    drain = start.drain(world)
    if not plan["finished"]:
        try:
            session = open_session(options.run, start.checked, drain.due)
            encoder = dataclasses.replace(start.encoder, now=datetime.datetime.fromisoformat(plan["began"]))
            served = serve_share(session, _share(start, plan, path, overall), encoder, drain, monitor)
        except Halted:
            served = Served(0, False)
    complete = _conclude(start, world, served, monitor, drain, overall)
    if monitor is not None:
        monitor.close("completed" if complete else "preempted")
    if overall is not None:
        overall.end(complete)
    if start.job is not None and start.job.lock is not None:
        start.job.lock.release()
    leave(world)
    return served.exit_code or (0 if complete else TRY_AGAIN)


def _planner(start: Start, world: World) -> Callable[[], dict[str, Any] | None]:
    """On rank 0, what tells the others of the job. A pipe is copied to a file first, so that it can be read twice."""
    opening: Background[Job] | None = None

    def poll() -> dict[str, Any] | None:
        nonlocal opening
        if start.job is None:
            opening = opening or Background(lambda: _open_late(start))
            start.job = opening.poll()
            if start.job is None:
                return {"stop": True} if world.watch.draining.is_set() else None
        job = start.job
        return {
            "finished": job.done == job.total,
            "names": dataclasses.asdict(job.names),
            "began": job.began.isoformat(),
            "survey": pack_survey(job.survey) if world.n_replicas > 1 else None,
            "task": None if job.task is None else job.task.label,
        }

    return poll


def _open_late(start: Start) -> Job:
    name = start.options.input_file
    if not is_stream(name):
        return open_job(start.options, start.checked, start.encoder, Path(name).resolve())
    # Without a name, so that nothing is left of it however the process ends.
    start.copy = copy = tempfile.TemporaryFile(prefix="llama_dist-")  # noqa: SIM115 (it stays open)
    with open(sys.stdin.fileno() if name == "-" else name, "rb", closefd=name != "-") as source:
        shutil.copyfileobj(source, copy)
    copy.flush()
    return open_job(start.options, start.checked, start.encoder, Path(f"/proc/self/fd/{copy.fileno()}"))


def _share(start: Start, plan: dict[str, Any], path: Path | None, overall: Overall | None) -> Share | None:
    """This rank's view of the lines to be done; None on ranks that neither read nor write."""
    names = Names(**plan["names"])
    if start.job is not None:
        return Share(start.job.survey, names, path, start.job.task, overall)
    if plan["survey"] is None:
        return None
    found = unpack_survey(plan["survey"], Path(os.path.realpath(start.options.input_file)))
    task = None if plan["task"] is None else Task(plan["task"], start.options.lease_timeout)
    return Share(found, names, path, task)


def _last_words(monitor: Monitor | None, path: Path | None, overall: Overall | None) -> Callable[[str, int], None]:
    def say(message: str, code: int) -> None:
        note_end(monitor, path, message, code)
        if overall is not None:
            overall.end(False)

    return say


def _conclude(
    start: Start, world: World, served: Served, monitor: Monitor | None, drain: Drain, overall: Overall | None
) -> bool:
    """Bring the output to its end on rank 0, which may take a while; whether every line has its record, everywhere."""
    job = start.job
    ending: Background[tuple[bool, Found | None]] | None = None

    def poll() -> dict[str, bool] | None:
        nonlocal ending
        assert job is not None
        if job.output is None:
            return {"complete": served.complete and not served.exit_code}
        output, ordered = job.output, start.options.ordered
        if ending is None:
            if job.task is None:
                ending = Background(lambda: conclude(output, job.survey, ordered, served.complete))
            else:
                assert monitor is not None and overall is not None, "rank 0 has them"
                ending = Background(lambda: _conclude_shared(job, served, ordered, drain, monitor, overall))
        ended = ending.poll()
        if ended is None:
            return None
        complete, stock = ended
        if stock is not None and monitor is not None:  # with what the other replicas did
            monitor.settle(stock.done, stock.failed)
        return {"complete": complete}

    return bool(next_message(world, poll)["complete"])


def _conclude_shared(
    job: Job, served: Served, ordered: bool, drain: Drain, monitor: Monitor, overall: Overall
) -> tuple[bool, Found | None]:
    assert job.output is not None and job.task is not None, "a shared output is a file"

    def announce(done: int, failed: int) -> None:
        monitor.settle(done, failed)
        overall.copy(state="completed", done=done, failed=failed, updated=time.time())

    complete = conclude_shared(job.output, job.survey, job.task, ordered, served.complete, drain.due, announce)
    if complete and (counted := overall.counted()) is not None:
        monitor.settle(*counted)
    return complete, None
