"""Several independent tasks on one output: how one joins the others, and what it finds done.

Each task writes to part files of its own, and the output itself changes in one step only (merging.py), when every line
has its record in some part. So no task ever repairs, cuts or waits for a file that another writes.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import shutil
import socket
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from llama_dist.errors import ConfigError
from llama_dist.frontend.batch.blocks import open_blocks
from llama_dist.frontend.batch.cards import counts
from llama_dist.frontend.batch.identity import (
    Beginning,
    Fingerprint,
    changes,
    fingerprint_path,
    fingerprint_text,
    read_identity,
)
from llama_dist.frontend.batch.outfile import parts_of
from llama_dist.frontend.batch.records import records, take_stock
from llama_dist.frontend.batch.survey import DONE, FAILED, REPEATED, TODO, Survey
from llama_dist.frontend.status import replace_file

log = logging.getLogger("llama_dist")

MOST_BLOCKS = 4096  # leases of a job, at most
Stamp = tuple[int, int, int]


@dataclass(frozen=True)
class Task:
    """What a world knows of itself as one of several. `stamp`: the output's state when this task joined, None: none.

    `before`: what the others had written then.
    """

    label: str
    timeout: float
    stamp: Stamp | None = None
    before: Mapping[str, tuple[int, int]] = field(default_factory=dict)


def task_label(env: Mapping[str, str] = os.environ) -> str:
    """What the task is called in names of files: as Slurm calls it in an array, else by its host and pid."""
    array, task = env.get("SLURM_ARRAY_JOB_ID"), env.get("SLURM_ARRAY_TASK_ID")
    label = f"{array}_{task}" if array and task else f"{socket.gethostname()}-{os.getpid()}"
    return re.sub(r"[^\w.-]", "_", label)[:100]


def folder_of(output: Path) -> Path:
    """Where the tasks tell each other what they do."""
    return output.with_name(output.name + ".leases")


def agreed_path(output: Path) -> Path:
    """What the tasks that share the output have agreed on: the file of the job's identity."""
    return folder_of(output) / "job.json"


def lines_in_block(n_lines: int) -> int:
    """The same in every task: 1 up to MOST_BLOCKS lines, 256 for a million."""
    size = 1
    while size * MOST_BLOCKS < n_lines:
        size *= 2
    return size


def others_wrote(output: Path) -> Mapping[str, tuple[int, int]]:
    """Records, and errors among them, by the id of the task that wrote them, so far."""
    return counts(folder_of(output))


def stamp_of(output: Path) -> Stamp | None:
    try:
        found = os.stat(output)
    except FileNotFoundError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns


def enter(output: Path, mine: Fingerprint, start: Beginning, force: bool, reproducible: bool | None) -> Beginning:
    """Join the tasks that work on the output, or be the first; how their job began. ConfigError for another job's.

    Of several that come at once one decides, by the link that only one can make.
    """
    folder, agreed = folder_of(output), agreed_path(output)
    new = folder / f"job-{os.urandom(8).hex()}.new"
    text = fingerprint_text(mine, start)
    for _ in range(10):
        try:
            folder.mkdir(exist_ok=True)
            new.write_bytes(text)
            os.link(new, agreed)
        except FileNotFoundError:  # another has just finished the job, and taken the folder away
            continue
        except FileExistsError:
            before = read_identity(agreed)
            if before is None:
                continue
            changed = changes(mine, before.fingerprint, reproducible)
            if changed and not force:
                raise ConfigError(
                    f"{output} is shared by tasks that differ in {'; '.join(changed)}; start them all alike, give "
                    f"another --output_file, or remove {folder} if none of them is to go on"
                ) from None
            start = before.start
            if changed:
                replace_file(agreed, fingerprint_text(mine, start), durable=True)
        except OSError as err:
            raise ConfigError(
                f"{folder} cannot be shared ({err.strerror}); --shared_output needs a folder that takes hard links"
            ) from None
        finally:
            with contextlib.suppress(OSError):
                new.unlink()
        break
    else:
        raise ConfigError(f"{folder} comes and goes; wait until the other tasks have ended")
    with contextlib.suppress(FileNotFoundError):
        replace_file(fingerprint_path(output), agreed.read_bytes(), durable=True)
    return start


def take_stock_of_all(output: Path, found: Survey) -> int:
    """Mark what the output and all parts answer, and change none of them; the number of errors among that.

    A block counts as done no more where a line of it is nowhere, as after the loss of a part.
    """
    folder = folder_of(output)
    said = {path.name.removesuffix(".done") for path in folder.glob("*.done")}  # before the parts are read
    failed = take_stock(output, found.marks).failed
    for part in parts_of(output):
        failed += mark_part(part, found.marks)
    left = {str(block) for block in open_blocks(found.marks, lines_in_block(found.n_lines)).tolist()}
    for name in said & left:
        with contextlib.suppress(OSError):
            (folder / f"{name}.done").unlink()
    return failed


def mark_part(part: Path, marks: bytearray) -> int:
    """Mark the lines that a part answers, which its owner may be writing; the number of errors among them."""
    failed = 0
    with contextlib.suppress(OSError):  # merged meanwhile
        for record in records(part):
            if 0 < record.line < len(marks) and marks[record.line] in (TODO, REPEATED):
                marks[record.line] = FAILED if record.failed else DONE
                failed += record.failed
    return failed


def clear(output: Path) -> None:
    """Take the folder of the leases away, in one step for whoever looks."""
    old = output.with_name(f"{output.name}.leases-{os.urandom(8).hex()}")
    with contextlib.suppress(FileNotFoundError):
        os.rename(folder_of(output), old)
    for path in output.parent.iterdir():  # what others were stopped at, too
        if re.fullmatch(re.escape(output.name) + r"\.leases-[0-9a-f]{16}", path.name):
            shutil.rmtree(path, ignore_errors=True)
