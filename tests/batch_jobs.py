"""What test_batch.py runs on every rank: the `batch` command as a command line, with something happening on the way."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llama_dist import cli
from llama_dist.frontend.batch import command, outfile
from llama_dist.parallel.launch import read_launch
from llama_dist.parallel.watch import Watch

TINY = ["--dtype=float32", "--device=cpu", "--max_seq_len=96", "--check_every=1", "--timeout=60", "--grace=60"]


@dataclass(frozen=True)
class Done:
    code: int
    out: str
    err: str


def batch(folder: str, source: str, output: str, flags: list[str]) -> Done:
    """The command on this rank; what it printed, and its exit code."""
    usual = [flag for flag in TINY if flag.partition("=")[0] not in {given.partition("=")[0] for given in flags}]
    line = cli.parse(
        ["batch", f"--ckpt_dir={folder}", f"--input_file={source}", f"--output_file={output}", *usual, *flags]
    )
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = cli.prepare(line, read_launch().size)()
    return Done(code, out.getvalue(), err.getvalue())


def _at_append(turn: int, rank: int, act: Callable[[outfile.Appender, bytes], None]) -> None:
    """Do something before the `turn`-th batch of records is written by this rank, if it is the one."""
    real, count = outfile.Appender.append, [0]

    def append(self: outfile.Appender, data: Any) -> None:
        count[0] += Watch.current() is not None  # the ranks have met; merging what was left before is not meant
        if count[0] == turn and read_launch().rank == rank:
            act(self, bytes(data))
        real(self, data)

    outfile.Appender.append = append  # type: ignore[method-assign]


def eager() -> None:
    """Records go to disk at once, so that a short job has many moments to be killed in."""
    from llama_dist.frontend.batch import desk

    desk.FLUSH_SECONDS = 0.0


def killed(folder: str, source: str, output: str, flags: list[str], turn: int, rank: int, torn: bool) -> Done:
    """As `batch`, but kill -9 takes `rank` when it writes for the `turn`-th time, half of it written if `torn`.

    Another replica writes once, which is waited for, and no more: there are lines for both, whoever is held up.
    """
    eager()
    path = Path(output)

    def anything_written() -> bool:
        return any(file.exists() and b"\n" in file.read_bytes() for file in [path, *outfile.parts_of(path)])

    def die(appender: outfile.Appender, data: bytes) -> None:
        while not anything_written():
            time.sleep(0.01)
        if torn:
            os.write(appender._fd, data[: len(data) // 2])
        os.kill(os.getpid(), signal.SIGKILL)

    def stay(appender: outfile.Appender, data: bytes) -> None:
        while True:  # until the other's death ends this rank too
            time.sleep(1)

    _at_append(turn, rank, die)
    _at_append(2, 1 - rank, stay)
    return batch(folder, source, output, flags)


def drained(folder: str, source: str, output: str, flags: list[str], turn: int) -> Done:
    """As `batch`, but told to stop when rank 0 writes for the `turn`-th time."""
    eager()

    def stop(appender: outfile.Appender, data: bytes) -> None:
        watch = Watch.current()
        assert watch is not None
        watch.draining.set()

    _at_append(turn, 0, stop)
    return batch(folder, source, output, flags)


def without_weights(folder: str, source: str, output: str, flags: list[str]) -> Done:
    """As `batch`, where reading weights is an error."""

    def refuse(*args: Any) -> None:
        raise AssertionError("weights were read")

    command.open_session = refuse  # type: ignore[assignment]
    return batch(folder, source, output, flags)


def opened_late(folder: str, source: str, output: str, flags: list[str]) -> Done:
    """As `batch` with files so large that the ranks meet before they are read."""
    command.EARLY_BYTES = 0
    return batch(folder, source, output, flags)


def slow_to_load(folder: str, source: str, output: str, flags: list[str], seconds: float) -> Done:
    """As `batch`, where the last rank's files are slow to read."""
    from llama_dist.engine import session

    real = session.load

    def load(*args: Any, **named: Any) -> None:
        if read_launch().rank == read_launch().size - 1:
            time.sleep(seconds)
        real(*args, **named)

    session.load = load
    return batch(folder, source, output, flags)


def stopped_while_loading(folder: str, source: str, output: str, flags: list[str]) -> tuple[Done, int]:
    """As `batch`, told to stop on the last rank before its first tensor; and how many tensors this rank read."""
    from llama_dist.checkpoint import load

    count, real = [0], load.fill

    def fill(*args: Any) -> None:
        watch = Watch.current()
        if read_launch().rank == read_launch().size - 1 and watch is not None:
            watch.draining.set()
        count[0] += 1
        real(*args)

    load.fill = fill
    return batch(folder, source, output, flags), count[0]


def under_srun(folder: str, source: str, output: str, flags: list[str]) -> Done:
    """As `batch`, with srun's variables in place of torchrun's."""
    rank, size, port = (os.environ.pop(name) for name in ("RANK", "WORLD_SIZE", "MASTER_PORT"))
    os.environ.update(SLURM_JOB_ID="7", SLURM_STEP_ID="0", SLURM_PROCID=rank, SLURM_LOCALID=rank, SLURM_NTASKS=size)
    os.environ["MASTER_PORT"] = port
    return batch(folder, source, output, flags)


def from_endless_pipe(folder: str, output: str) -> Done:
    """As `batch --input_file -` of a pipe that does not end; told to stop while it is read."""
    reads, writes = os.pipe()
    os.write(writes, b'{"prompt": "a"}\n')
    os.dup2(reads, 0)
    sys.stdin = open(0, closefd=False)  # noqa: SIM115 (a forked rank has none)

    def stop() -> None:
        while (watch := Watch.current()) is None:
            time.sleep(0.05)
        time.sleep(0.5)
        watch.draining.set()

    threading.Thread(target=stop, daemon=True).start()
    return batch(folder, "-", output, [])


def from_stdin(folder: str, source: str, flags: list[str]) -> Done:
    """As `batch --input_file - --output_file -`."""
    if read_launch().rank == 0:
        os.dup2(os.open(source, os.O_RDONLY), 0)
        sys.stdin = open(0, closefd=False)  # noqa: SIM115 (a forked rank has none)
    return batch(folder, "-", "-", flags)


def records_of(path: Path) -> list[bytes]:
    return sorted(path.read_bytes().splitlines(keepends=True))
