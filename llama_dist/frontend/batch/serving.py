"""One replica's share of a job: its lines through its engine, to its own file."""

from __future__ import annotations

import functools
import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from llama_dist.engine.serve import serve
from llama_dist.engine.session import Session
from llama_dist.engine.stats import EngineStats
from llama_dist.frontend.batch.blocks import block_size, claimed_lines
from llama_dist.frontend.batch.desk import Desk, Watch
from llama_dist.frontend.batch.drain import Drain
from llama_dist.frontend.batch.leases import Leases
from llama_dist.frontend.batch.others import Others
from llama_dist.frontend.batch.outfile import Appender, Sink, Standard, part_path
from llama_dist.frontend.batch.prompts import Encoder
from llama_dist.frontend.batch.results import Names
from llama_dist.frontend.batch.shared_lines import SharedLines
from llama_dist.frontend.batch.sharing import Task, folder_of
from llama_dist.frontend.batch.status import Overall
from llama_dist.frontend.batch.survey import REPEATED, TODO, Survey
from llama_dist.frontend.monitor import Finished, Monitor
from llama_dist.parallel.claims import meet
from llama_dist.parallel.control import claim
from llama_dist.parallel.world import World

AHEAD, AHEAD_OF_MANY = 4, 2  # batches of requests in flight; fewer where another replica may be free for them sooner


@dataclass(frozen=True)
class Share:
    """The lines of the job, what its records are called by, and where they go (None: stdout).

    `task`: of a world that shares all that with others; `overall` then, on rank 0, the status of all.
    """

    survey: Survey
    names: Names
    output: Path | None
    task: Task | None = None
    overall: Overall | None = None


@dataclass(frozen=True)
class Served:
    """`exit_code` is not 0 where nobody reads the results any more; `complete`: all lines of this rank's claims."""

    exit_code: int
    complete: bool


def serve_share(
    session: Session, work: Share | None, encoder: Encoder, drain: Drain, monitor: Monitor | None
) -> Served:
    """Serve lines until none is left or it is time to stop. Every rank calls it; a replica's first reads and writes."""
    world, engine = session.world, session.engine
    served = Served(0, True)
    if world.mp_rank != 0:
        serve(world, engine, lambda idle: [], lambda done, stats: None)
    else:
        assert work is not None, "a replica's first rank knows the lines"
        source = _shared(work) if work.task is not None else _alone(world, work, monitor)
        alone = world.n_replicas == 1 and work.task is None
        try:
            desk = Desk(
                work.survey,
                source.lines,
                encoder,
                work.names,
                session.run.seed,
                source.sink,
                session.run.max_batch_size * (AHEAD if alone else AHEAD_OF_MANY),
                drain,
                engine.validate,
                _watcher(source, work.overall, monitor),
            )
            serve(world, engine, desk.inbox, desk.outbox)
            source.sink.close()
        finally:
            source.leave()
        served = Served(source.sink.exit_code if isinstance(source.sink, Standard) else 0, desk.complete)
    meet(world, "served")  # a slow replica is no dead one
    return served


@dataclass(frozen=True)
class _Source:
    """Where a replica's lines come from and its records go. `news`: records of others since last asked, errors among
    them. `leave`: no more lines are taken.
    """

    lines: Iterator[tuple[int, bytes] | None]
    sink: Sink
    news: Callable[[], tuple[int, int]] = lambda: (0, 0)
    leave: Callable[[], None] = lambda: None


def _alone(world: World, work: Share, monitor: Monitor | None) -> _Source:
    """The job is this world's own: replicas claim at a counter in the store."""
    left = work.survey.marks.count(TODO, 1) + work.survey.marks.count(REPEATED, 1)
    size, output = block_size(left, world.n_replicas), work.output
    if world.n_replicas == 1 or output is None:
        lines = claimed_lines(work.survey, size, itertools.count().__next__)
        return _Source(lines, Standard() if output is None else Appender(output))
    lines = claimed_lines(work.survey, size, functools.partial(claim, world, "batch"))
    sink = Appender(part_path(output, world.replica))
    if monitor is None:
        return _Source(lines, sink)
    return _Source(lines, sink, Others([part_path(output, replica) for replica in range(1, world.n_replicas)]).news)


def _shared(work: Share) -> _Source:
    """Other worlds work on the same job: each replica claims by leases."""
    assert work.task is not None and work.output is not None, "a shared output is a file"
    part = part_path(work.output, f"t{os.urandom(8).hex()}")
    sink, task = Appender(part), work.task
    leases = Leases(folder_of(work.output), task.label, part.name, task.timeout, task.before)
    shared = SharedLines(work.survey, work.output, leases, sink)
    return _Source(shared.lines(), shared, leases.news, leases.leave)


def _watcher(source: _Source, overall: Overall | None, monitor: Monitor | None) -> Watch:
    """What hears of each tick: on rank 0 the monitor, which counts the records of others too."""
    if monitor is None:
        return lambda stats, finished: None

    def watch(stats: EngineStats, finished: Sequence[Finished]) -> None:
        monitor.count_others(*source.news())
        monitor.tick(stats, finished)
        if overall is not None:
            overall.tick()

    return watch
