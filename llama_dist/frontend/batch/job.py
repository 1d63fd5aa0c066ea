"""Opening a job on rank 0: what is asked, what stands already, and whether the two belong together."""

from __future__ import annotations

import datetime
import os
import stat
from dataclasses import dataclass, replace
from pathlib import Path

from llama_dist.engine.session import Checked
from llama_dist.errors import ConfigError
from llama_dist.frontend.batch import outfile
from llama_dist.frontend.batch.identity import (
    Beginning,
    changes,
    fingerprint,
    fingerprint_path,
    job_id,
    model_name,
    read_before,
    system_fingerprint,
    write_fingerprint,
)
from llama_dist.frontend.batch.lines import LineError, parse_line
from llama_dist.frontend.batch.lock import Lock
from llama_dist.frontend.batch.prompts import Encoder
from llama_dist.frontend.batch.records import Found, in_order, records, take_stock
from llama_dist.frontend.batch.results import Names
from llama_dist.frontend.batch.sharing import Task, clear, enter, others_wrote, stamp_of, take_stock_of_all, task_label
from llama_dist.frontend.batch.survey import BLANK, FAILED, REPEATED, TODO, Survey, survey
from llama_dist.frontend.options import BatchOptions

STDIO = "-"
_NOTHING_DONE = bytes(BLANK if mark == BLANK else TODO for mark in range(256))


@dataclass(frozen=True)
class Job:
    """`output` None: stdout. `done` of `total` lines have a record already, `failed` of them an error.

    `began`: when the job's first run did. `task`: of one that shares its output with others.
    """

    survey: Survey
    names: Names
    output: Path | None
    total: int
    done: int
    failed: int
    lock: Lock | None
    began: datetime.datetime
    task: Task | None = None

    @property
    def finished(self) -> bool:
        return self.done == self.total


def output_path(options: BatchOptions) -> Path | None:
    """The output file, None for stdout. ConfigError where it is something else than a file, or the input itself."""
    if options.output_file == STDIO:
        return None
    path = Path(os.path.realpath(options.output_file))
    if path.exists() and not path.is_file():
        raise ConfigError(f"--output_file {path} is no regular file; name a file, or - for stdout")
    if not path.parent.is_dir():
        raise ConfigError(f"--output_file {path}: there is no folder {path.parent}; make it first")
    if options.input_file != STDIO and os.path.realpath(options.input_file) == str(path):
        raise ConfigError(f"--output_file is the input file {path}; results need a file of their own")
    return path


def is_stream(input_file: str) -> bool:
    """Whether the input can be read only once: stdin or a pipe. ConfigError where there is nothing to read."""
    if input_file == STDIO:
        return True
    try:
        mode = os.stat(input_file).st_mode
    except OSError as err:
        raise ConfigError(f"--input_file {input_file} cannot be read: {err.strerror}") from None
    if stat.S_ISDIR(mode):
        raise ConfigError(f"--input_file {input_file} is a folder, must be a file of JSON lines")
    return not stat.S_ISREG(mode)


def open_job(options: BatchOptions, checked: Checked, encoder: Encoder, source: Path) -> Job:
    """Survey the input, lock the output, and bring what an earlier run left into order. ConfigError for a refusal.

    `source`: the input, or the copy of what came from a pipe.
    """
    path = output_path(options)
    lock = _lock(path, options) if path is not None else None
    task = None
    try:
        found = survey(source)
        mine = fingerprint(checked, encoder, options, found)
        now = datetime.datetime.now().replace(microsecond=0)
        given = STDIO if is_stream(options.input_file) else os.path.abspath(options.input_file)
        start = Beginning(model_name(options.run.ckpt_dir), now, given)
        if path is not None:
            start = _accept(path, mine, options.force, options.run.reproducible) or start
        if options.strict:
            check_all(found, replace(encoder, now=start.at), options.input_file)
        failed = 0
        if path is not None and (options.retry_failed or not options.shared_output):
            write_fingerprint(path, mine, start)
            failed = restore(path, found, options.retry_failed)
        if path is not None and lock is not None and options.shared_output:
            lock.share()
            start = enter(path, mine, start, options.force, options.run.reproducible)
            # In this order: what is done after one of them was asked is seen by the next.
            task = Task(task_label(), options.lease_timeout, stamp_of(path), others_wrote(path))
            failed = take_stock_of_all(path, found)
    except BaseException:
        if lock is not None:
            lock.release()
        raise
    total = found.n_lines - found.marks.count(BLANK, 1)
    left = found.marks.count(TODO, 1) + found.marks.count(REPEATED, 1)
    names = Names(job_id(mine), start.model, options.cached_tokens, system_fingerprint(mine))
    return Job(found, names, path, total, total - left, failed, lock, start.at, task)


def _lock(path: Path, options: BatchOptions) -> Lock:
    try:
        return Lock(path, options.shared_output and not options.retry_failed)
    except ConfigError as err:
        if options.shared_output and options.retry_failed:
            raise ConfigError(f"{err}; --retry_failed needs the output for itself at first") from None
        raise


def _accept(path: Path, mine: dict[str, object], force: bool, reproducible: bool | None) -> Beginning | None:
    """How results that stand already were begun, None where there are none. ConfigError if they are not ours."""
    firsts = (next(iter(records(p)), None) for p in (path, *outfile.parts_of(path)))
    first = next((record for record in firsts if record is not None), None)
    if first is None:
        return None
    before = read_before(path)
    if first.line == 0 and first.raw.endswith(b"\n") and before is None:
        raise ConfigError(f"{path} is there and holds no results of a batch job; give another --output_file")
    if before is None:
        if not force:
            raise ConfigError(
                f"{path} has results but {fingerprint_path(path).name} is gone, so whose they are is not known; "
                "--force takes them as this job's"
            )
        return None
    changed = changes(mine, before.fingerprint, reproducible)
    if changed and not force:
        raise ConfigError(
            f"{path} belongs to a job that differs in {'; '.join(changed)}; give another --output_file, "
            "or --force to keep its results and go on"
        )
    return before.start


def restore(path: Path, found: Survey, retry_failed: bool) -> int:
    """Repair the output, merge the parts of replicas, and mark what is answered; the number of errors among that."""
    pristine = bytes(found.marks)
    stock = take_stock(path, found.marks)
    if stock.bad:
        outfile.keep_sound(path, found.n_lines)
    elif stock.torn:
        outfile.cut(path, stock.sound)
    if outfile.parts_of(path):
        outfile.merge_parts(path, found.n_lines)
        found.marks[:] = pristine
        stock = take_stock(path, found.marks)
    clear(path)
    if not (retry_failed and stock.failed):
        return stock.failed
    outfile.keep(path, lambda record: not record.failed)
    for number, mark in enumerate(found.marks):
        if mark == FAILED:
            found.marks[number] = pristine[number]
    return 0


def check_all(found: Survey, encoder: Encoder, name: str) -> None:
    """ConfigError naming the first bad lines, if there are any."""
    shown: list[str] = []
    bad = 0
    for number, raw in found.lines(1, found.n_lines + 1):
        if found.marks[number] == BLANK:
            continue
        try:
            parse_line(raw, number, encoder)
            error = (
                f"its custom_id is on line {found.first_of(number)} too" if found.marks[number] == REPEATED else None
            )
        except LineError as err:
            error = str(err)
        if error is not None:
            bad += 1
            if len(shown) < 3:
                shown.append(f"line {number}: {error}")
    if bad:
        more = f"; and {bad - len(shown)} more" if bad > len(shown) else ""
        raise ConfigError(f"{name} has {bad} bad line{'s' if bad > 1 else ''}: {'; '.join(shown)}{more}")


def conclude(path: Path, found: Survey, ordered: bool, complete: bool) -> tuple[bool, Found | None]:
    """Merge what the replicas wrote; whether every line has its record now, and what was counted where that was needed.

    `complete`: the one replica's lines are all there; those of several are counted. `ordered`: then put them in order.
    """
    stock = None
    if outfile.parts_of(path):
        outfile.merge_parts(path, found.n_lines)
        marks = bytearray(found.marks).translate(_NOTHING_DONE)
        stock = take_stock(path, marks)
        complete = marks.count(TODO, 1) == 0
    if complete and ordered and not in_order(path):
        outfile.put_in_order(path, found.n_lines)
    return complete, stock
