"""The end of a job that several tasks share: one of them makes one file of all results, the others see it done."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from llama_dist.errors import LlamaDistError
from llama_dist.frontend.batch.leases import Leases
from llama_dist.frontend.batch.outfile import keep_mode, parts_of, put_in_order, replace_with, sync_folder
from llama_dist.frontend.batch.records import in_order, records
from llama_dist.frontend.batch.sharing import Task, clear, folder_of, stamp_of
from llama_dist.frontend.batch.survey import BLANK, REPEATED, TODO, Survey

log = logging.getLogger("llama_dist")

MERGE = "merge"  # the lease of the task that merges
POLL = 0.2  # seconds between two questions whether another has merged


def conclude_shared(
    output: Path,
    found: Survey,
    task: Task,
    ordered: bool,
    complete: bool,
    stopping: Callable[[], bool],
    announce: Callable[[int, int], None],
) -> bool:
    """Bring the output to its end, or see another task do so; whether every line has its record in it now.

    `complete`: all lines have one, be it in a part. `announce(done, failed)` is called before the others learn of
    the end.
    """
    leases = Leases(folder_of(output), task.label, "", task.timeout)
    try:
        while not leases.over:
            if not complete:
                return False
            if leases.claim(MERGE):
                return _merge(output, found, ordered, leases, announce)
            if stopping():
                return False
            time.sleep(POLL)
            leases.look()
    finally:
        leases.leave()
    if stamp_of(output) == task.stamp and found.marks.count(TODO, 1) + found.marks.count(REPEATED, 1):
        raise LlamaDistError(f"{folder_of(output)} was removed while the job ran; run it again")
    return True


def _merge(output: Path, found: Survey, ordered: bool, leases: Leases, announce: Callable[[int, int], None]) -> bool:
    """Put a new file with a record of each line in the place of the output, and take the rest away.

    May be ended at any moment and done anew, by another task too: nothing is dropped before the output is whole, and
    the new file lies in the folder of the leases, so a task that wakes after the end has none to put anywhere.
    """
    folder, parts = folder_of(output), parts_of(output)
    total = found.n_lines - found.marks.count(BLANK, 1)
    new = folder / f"merged-{os.urandom(8).hex()}"
    seen = bytearray(found.n_lines + 1)
    failed = 0

    def pieces() -> Iterator[bytes]:
        nonlocal failed
        for path in (output, *parts):
            for record in records(path):
                if 0 < record.line <= found.n_lines and not seen[record.line]:
                    seen[record.line] = 1
                    failed += record.failed
                    yield record.raw

    try:
        replace_with(new, pieces())
        done = seen.count(1)
        if done < total:
            new.unlink()
            log.warning("%d lines that were done have no result any more; run it again to answer them", total - done)
            return False
        if ordered and not in_order(new):
            put_in_order(new, found.n_lines)
        keep_mode(new, output)
        os.replace(new, output)
        sync_folder(output)
        announce(done, failed)
        if leases.holds(MERGE):  # else another has done so, and the folder may be a new job's
            clear(output)
        for part in parts:
            part.unlink(missing_ok=True)
    except (OSError, LlamaDistError) as err:
        if folder.is_dir():
            raise (
                err if isinstance(err, LlamaDistError) else LlamaDistError(f"merging {output}: {err.strerror}")
            ) from None
        leases.over = True  # another took over and merged while this one stood still
    return True
