"""Ranks of a real command line, as processes, with a fault planted in one of them at a tick."""

from __future__ import annotations

import multiprocessing
import os
import resource
import signal
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.spmd import PRELOAD, free_port, rank_env


@dataclass(frozen=True)
class Fault:
    """What happens on `rank` at `tick`: kill, launcher (its parent is killed), stop, raise, memory, other, term, twice,
    late (told to stop, and again where the others have left and it has not). `hold`: every rank stands still at `tick`
    until there is a file `go`.

    `full`: no file may grow beyond so many bytes as `tick` says, from the start.
    """

    kind: str
    rank: int
    tick: int
    go: Path | None = None


@dataclass(frozen=True)
class Ended:
    """How the ranks ended: exit codes (negative: the signal), what they wrote to stderr, seconds from the fault to the
    end of all of them, and to that of the rank it struck.
    """

    codes: list[int | None]
    log: str
    seconds: float
    victim_seconds: float

    @property
    def errors(self) -> list[str]:
        return [line for line in self.log.splitlines() if line.startswith("llama_dist: error:")]


def plant(fault: Fault, mark: Path) -> None:
    """Put the fault into this process; `mark` is touched when it strikes."""
    from llama_dist.engine.engine import Computed, Engine
    from llama_dist.frontend.batch import desk
    from llama_dist.model.transformer import Transformer
    from llama_dist.parallel.watch import Watch

    desk.FLUSH_SECONDS = 0.0
    if fault.kind == "full":
        resource.setrlimit(resource.RLIMIT_FSIZE, (fault.tick, resource.RLIM_INFINITY))
        mark.touch()
        return
    step, choose, known, greatest = Engine.step, Engine._choose, Engine._known, Transformer.greatest
    strikes: list[bool] = []

    def act() -> None:
        if fault.kind != "twice":
            mark.touch()
        if fault.kind == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif fault.kind == "launcher":
            os.kill(os.getppid(), signal.SIGKILL)
        elif fault.kind == "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        elif fault.kind == "raise":
            raise ValueError("the cat sat on the keyboard")
        elif fault.kind == "memory":
            raise MemoryError("no more of it")
        elif fault.kind in ("term", "late"):  # while the main thread is in the next collective, waiting for rank 0
            threading.Timer(0.05, lambda: os.kill(os.getpid(), signal.SIGTERM)).start()
        elif fault.kind == "twice":
            threading.Timer(0.05, lambda: os.kill(os.getpid(), signal.SIGTERM)).start()
            threading.Timer(0.5, lambda: (mark.touch(), os.kill(os.getpid(), signal.SIGTERM))).start()
        elif fault.kind == "hold":
            assert fault.go is not None
            while not fault.go.exists():
                time.sleep(0.01)

    def faulty_step(self: Engine, *args: Any) -> Any:
        strikes[:] = [True] if self.ticks == fault.tick else []
        if strikes and fault.kind != "other":
            act()
        if fault.kind in ("term", "twice", "late"):
            time.sleep(0.05)  # the job must last until the signal is heeded
        return step(self, *args)

    def others(tokens: Any) -> Any:
        if tokens is None or not strikes:
            return tokens
        mark.touch()
        return [(token + 1) % 200 for token in tokens]

    def other_known(self: Engine) -> Computed | None:
        found = known(self)
        return found and found._replace(after=others(found.after))

    def late_detach(self: Watch) -> None:
        board = self._board
        assert board is not None
        time.sleep(0.5)  # the others are through with leaving: the store must still be there
        while not any(board.has_left(other.rank) for other in self._cards if other.rank != fault.rank):
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.3)
        detach(self)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.3)

    detach = Watch.detach
    if fault.kind == "late":
        Watch.detach = late_detach  # type: ignore[method-assign]
    Engine.step = faulty_step  # type: ignore[method-assign]
    if fault.kind == "other":
        Engine._choose = lambda *args: others(choose(*args))  # type: ignore[method-assign]
        Transformer.greatest = lambda *args: others(greatest(*args))  # type: ignore[method-assign]
        Engine._known = other_known  # type: ignore[method-assign]


def _rank(env: dict[str, str], argv: Sequence[str], fault: Fault | None, log: str, mark: str) -> None:
    os.environ.update(env)
    out = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.dup2(out, 1)
    os.dup2(out, 2)
    import torch

    from llama_dist.__main__ import main

    torch.set_num_threads(1)
    if fault is not None and (fault.kind == "hold" or int(env["RANK"]) == fault.rank):
        plant(fault, Path(mark))
    code = main(argv)
    os._exit(code)


def run_command(world: int, argv: Sequence[str], folder: Path, fault: Fault | None = None, within: float = 90) -> Ended:
    """`python -m llama_dist ARGV` on `world` ranks until all have ended; a stopped one is killed then."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*PRELOAD, "llama_dist.frontend.batch.command"])
    log, mark, port = folder / "log", folder / "mark", free_port()
    for path in (log, mark):
        path.unlink(missing_ok=True)
    ranks = []
    for rank in range(world):
        args = (rank_env(rank, world, port), argv, fault, str(log), str(mark))
        ranks.append(context.Process(target=_rank, args=args))
        ranks[-1].start()
    began, struck, victim_gone = time.monotonic(), None, None
    stopped = fault.rank if fault is not None and fault.kind == "stop" else None
    while any(p.is_alive() for i, p in enumerate(ranks) if i != stopped):
        struck = struck or (time.monotonic() if mark.exists() else None)
        if fault is not None and victim_gone is None and not ranks[fault.rank].is_alive():
            victim_gone = time.monotonic()
        assert time.monotonic() - began < within, f"still running after {within} s:\n{log.read_text()}"
        time.sleep(0.01)
    ended = time.monotonic()
    for p in ranks:
        if p.is_alive():
            p.kill()
        p.join()
    spans = ended - (struck or began), (victim_gone or ended) - (struck or began)
    return Ended([p.exitcode for p in ranks], log.read_text() if log.exists() else "", *spans)
