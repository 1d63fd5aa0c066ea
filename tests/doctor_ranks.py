"""Ranks of a real `doctor`, as processes, with something planted in one of them that it is to find.

`python -m tests.doctor_ranks` is what torchrun starts: `python -m llama_dist`, with what the environment plants.
"""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.spmd import PRELOAD, free_port, rank_env


@dataclass(frozen=True)
class Plant:
    """What is odd about `rank`. `stop` and `kill`: at the step `at`, when the ranks `after` have come; `clock`: `at`
    seconds ahead; `slow`: its product is larger; `version`: of torch; `deaf`: tells the others a port where nobody
    listens; `late`: when they have begun and before they are through; `hang`: it computes for ten minutes, of which it
    gives itself 3 s.
    """

    kind: str
    rank: int
    at: Any = None
    after: tuple[int, ...] = ()


@dataclass(frozen=True)
class Ran:
    """Exit codes by rank (None: killed by the test), stdout by rank, and all of stderr."""

    codes: dict[int, int | None]
    out: dict[int, str]
    log: str
    seconds: float

    @property
    def report(self) -> dict[str, Any]:
        """Rank 0's, with --json."""
        found: dict[str, Any] = json.loads(self.out[0])
        return found

    def wrong(self) -> dict[str, list[int]]:
        """The ranks of each kind of finding that is wrong."""
        found: dict[str, list[int]] = {}
        for finding in self.report["findings"]:
            if finding["wrong"]:
                found.setdefault(finding["finding"], []).extend(finding["ranks"])
        return found


def calm() -> None:
    """The tests' machine is busy: what is slow by chance is no finding."""
    from llama_dist.frontend.doctor import findings, folders, links

    findings.SLOW, links.TIMES, links.MOST_LATENCY, links.LEAST_BANDWIDTH = 20.0, 1e6, 1e6, 0.0
    folders.LEAST_SPEED, folders.SLOWER = 0.0, 1e6


def _identify_as(**other: Any) -> None:
    from llama_dist.frontend.doctor import here

    identify = here.identify

    def identify_otherwise(*args: Any) -> Any:
        found, device = identify(*args)
        versions = {**found.versions, **other.get("versions", {})}
        return dataclasses.replace(found, **{**other, "versions": versions}), device

    here.identify = identify_otherwise  # type: ignore[assignment]


def plant(what: Plant, rank: int) -> None:
    """Put it into this process, which is that of `rank`."""
    if what.kind == "late" and rank == 0:
        _let_come(what.rank)
    if rank != what.rank:
        return
    from llama_dist.frontend.doctor import here
    from llama_dist.parallel import reach
    from llama_dist.parallel.roll import Roll

    if what.kind in ("stop", "kill"):
        step = Roll.step

        def stricken(self: Roll, name: str, *rest: Any) -> None:
            if name == what.at:
                while not self.is_told(*(f"here/{rank}" for rank in what.after)):
                    time.sleep(0.01)
                os.kill(os.getpid(), signal.SIGSTOP if what.kind == "stop" else signal.SIGKILL)
            step(self, name, *rest)

        Roll.step = stricken  # type: ignore[method-assign]
    elif what.kind == "clock":
        listen = reach.listen
        _identify_as(host="elsewhere")
        reach.listen = lambda address: listen(address, lambda: time.time_ns() + int(what.at * 1e9))  # type: ignore
    elif what.kind == "slow":
        here.SIDE = {"cpu": 2048}  # 64 times the work
    elif what.kind == "version":
        _identify_as(versions={"torch": what.at})
    elif what.kind == "deaf":
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        reach.listen = lambda address: port  # type: ignore[assignment]
    elif what.kind == "late":
        step = Roll.step

        def belated(self: Roll, name: str, *rest: Any) -> None:
            while not self.is_told("here"):  # that the others go on
                time.sleep(0.01)
            step(self, name, *rest)

        Roll.step = belated  # type: ignore[method-assign]
    elif what.kind == "hang":
        from llama_dist.frontend.doctor import command

        command.REST = 3.0
        here.time_device = lambda device: time.sleep(600)  # type: ignore[assignment,return-value]
    elif what.kind == "stop in mesh":
        from llama_dist.parallel import probe

        probe.time_pairs = lambda mesh, seconds: os.kill(os.getpid(), signal.SIGSTOP)  # type: ignore


def _let_come(late: int) -> None:
    """This rank does not look who is absent before the late one has come."""
    from llama_dist.frontend.doctor.examination import Examination

    look = Examination.look_for_absent

    def look_then(self: Examination) -> None:
        while not self.roll.is_told(f"here/{late}"):
            time.sleep(0.01)
        look(self)

    Examination.look_for_absent = look_then  # type: ignore[method-assign]


def _rank(env: dict[str, str], argv: Sequence[str], what: Plant | None, folder: str) -> None:
    os.environ.update(env)
    rank = int(env["RANK"])
    for fd, name in ((1, f"out-{rank}"), (2, "log")):
        os.dup2(os.open(f"{folder}/{name}", os.O_WRONLY | os.O_APPEND | os.O_CREAT), fd)
    import torch

    from llama_dist.__main__ import main

    torch.set_num_threads(1)
    calm()
    if what is not None:
        plant(what, rank)
    code = main(argv)
    os._exit(code)


def run_doctor(
    world: int,
    argv: Sequence[str] | Sequence[Sequence[str]],
    folder: Path,
    what: Plant | None = None,
    start: Collection[int] | None = None,
    within: float = 60,
) -> Ran:
    """`python -m llama_dist doctor ARGV` (one for all, or one a rank) on the ranks in `start` of a world."""
    folder.mkdir(exist_ok=True)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*PRELOAD, "llama_dist.frontend.doctor.command"])
    port, ranks = free_port(), {}
    started = list(range(world)) if start is None else sorted(start)
    began = time.monotonic()
    for rank in started:
        words = argv if not argv or isinstance(argv[0], str) else argv[rank]
        args = (rank_env(rank, world, port), ["doctor", *words], what, str(folder))
        ranks[rank] = context.Process(target=_rank, args=args)
        ranks[rank].start()
    stopped = what.rank if what is not None and what.kind.startswith("stop") else None
    while any(p.is_alive() for rank, p in ranks.items() if rank != stopped):
        if time.monotonic() - began > within:
            for p in ranks.values():
                p.kill()
            raise AssertionError(f"still running after {within} s:\n{(folder / 'log').read_text()}")
        time.sleep(0.01)
    seconds = time.monotonic() - began
    codes: dict[int, int | None] = {}
    for rank, p in ranks.items():
        codes[rank] = p.exitcode
        if p.is_alive():
            p.kill()
        p.join()
    out = {rank: path.read_text() for rank in started if (path := folder / f"out-{rank}").exists()}
    return Ran(codes, out, (folder / "log").read_text(), seconds)


def main() -> int:
    from llama_dist.__main__ import main as llama_dist

    calm()
    if "DOCTOR_PLANT" in os.environ:
        plant(Plant(*json.loads(os.environ["DOCTOR_PLANT"])), int(os.environ["RANK"]))
    return llama_dist(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
