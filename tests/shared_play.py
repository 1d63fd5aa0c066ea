"""Several tasks on one output without a model, in one process and in turn; one of them killed or stopped at a call."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from llama_dist.frontend.batch import leases as leases_module
from llama_dist.frontend.batch import merging, outfile, sharing
from llama_dist.frontend.batch.desk import Desk
from llama_dist.frontend.batch.drain import Drain
from llama_dist.frontend.batch.leases import Leases
from llama_dist.frontend.batch.outfile import Appender, part_path
from llama_dist.frontend.batch.shared_lines import SharedLines
from llama_dist.frontend.batch.sharing import folder_of
from tests.batch_play import ENCODER, Engine, Killed, opened

CALLS = ("write", "pwrite", "fsync", "replace", "rename", "link", "unlink")
TIMEOUT = 60.0


class Clock:
    """Half a second passes whenever it is asked, so that a task that stands still is lost without waiting."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        self.now += 0.5
        return self.now


class Task:
    """One task from its start to its end. Its heart beats with its ticks."""

    def __init__(self, source: Path, output: Path, ordered: bool = False, drain: Drain | None = None) -> None:
        self.source, self.output, self.ordered = source, output, ordered
        self.drain = drain or Drain(threading.Event(), None, 0)
        self.complete: bool | None = None
        self.counted: list[tuple[int, int]] = []
        self.answered = 0
        self.halves = 0  # answers of lines whose other answers were called off
        self._leases: list[Leases] = []
        self._lock: Any = None

    def run(self) -> Iterator[None]:
        """Yields after every tick."""
        job = opened(self.source, self.output, shared_output=True, ordered=self.ordered)
        self._lock = job.lock
        assert job.task is not None
        complete = job.finished
        if not complete:
            part = part_path(self.output, f"t{os.urandom(8).hex()}")
            leases = self.join(folder_of(self.output), "play", part.name, TIMEOUT)
            shared = SharedLines(job.survey, self.output, leases, Appender(part))
            lines, engine = shared.lines(), Engine()
            desk = Desk(
                job.survey, lines, ENCODER, job.names, 1, shared, 8, self.drain, lambda r: None, lambda s, f: None
            )
            while not (engine.stopping and not engine.queue):
                leases._beat()
                engine.run(desk, ticks=1)
                yield
            leases.leave()
            complete, self.answered = desk.complete, engine.answered
            cut = {name.partition(".")[0] for name in engine.called_off}
            self.halves = sum(name.partition(".")[0] in cut for name in engine.answers)
        real, merging.Leases = merging.Leases, self.join  # type: ignore[assignment, misc]
        try:
            self.complete = merging.conclude_shared(
                self.output, job.survey, job.task, self.ordered, complete, self.drain.due, self._announce
            )
        finally:
            merging.Leases = real  # type: ignore[misc]
        self._lock.release()

    def _announce(self, done: int, failed: int) -> None:
        self.counted.append((done, failed))

    def join(self, folder: Path, name: str, part: str, timeout: float) -> Leases:
        self._leases.append(Leases(folder, name, part, timeout, clock=Clock()))
        return self._leases[-1]

    def bury(self) -> None:
        """What the kernel does with what a killed process held."""
        for leases in self._leases:
            leases._stop.set()
        if self._lock is not None and self._lock._fd >= 0:
            os.close(self._lock._fd)
            self._lock._fd = -1


def run_all(*tasks: Task) -> None:
    """Tick in turn until all have ended."""
    left = [task.run() for task in tasks]
    while left:
        left = [run for run in left if next(run, "ended") != "ended"]


def _kind(name: str, args: tuple[Any, ...]) -> str:
    """What a call changes, in a word or two."""
    if name in ("write", "pwrite", "fsync"):
        named = os.readlink(f"/proc/self/fd/{args[0]}")
        return f"{name} {'part' if '.part-' in named else Path(named).suffix[1:]}"
    last = Path(args[1 if name in ("link", "replace") else 0])
    return f"{name} {'output' if last.name == 'out.jsonl' else last.suffix[1:]}"


class Struck:
    """Does `act` at the `at`-th system call of a task that changes the disk, before it, or half-way through a write."""

    def __init__(self, monkeypatch: Any, at: int, act: Callable[[], None]) -> None:
        self.left, self.armed, self.struck, self.dead, self._act = at, False, "", False, act
        fake = SimpleNamespace(**{name: getattr(os, name) for name in dir(os)})
        for name in CALLS:
            setattr(fake, name, lambda *args, name=name: self._call(name, *args))
        for module in (outfile, leases_module, merging, sharing):
            monkeypatch.setattr(module, "os", fake)
        monkeypatch.setattr(merging, "POLL", 0.0)
        monkeypatch.setattr("llama_dist.frontend.batch.desk.WAIT_SECONDS", 0.0)

    def _call(self, name: str, *args: Any) -> Any:
        real = getattr(os, name)
        if self.dead:  # nothing cleans up after kill -9
            raise Killed
        if self.armed:
            self.left -= 1
            if self.left == 0:
                self.struck, self.armed = _kind(name, args), False
                if name == "write" and len(args[1]) > 1:
                    half = real(args[0], args[1][: len(args[1]) // 2])
                    self._strike()
                    return half + real(args[0], args[1][half:])
                self._strike()
        return None if name == "fsync" else real(*args)

    def _strike(self) -> None:
        try:
            self._act()
        except Killed:
            self.dead = True
            raise

    def run(self, task: Task, between: Callable[[], None] = lambda: None) -> bool:
        """The whole of a task, struck on the way; False where that ended it."""
        run = task.run()
        while True:
            self.armed = not self.struck
            try:
                ended = next(run, "ended") == "ended"
            except Killed:
                self.dead = False
                task.bury()
                return False
            finally:
                self.armed = False
            if ended:
                return True
            between()
