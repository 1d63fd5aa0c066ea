"""One replica's share of a job: its lines through its engine, to its own file."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from llama_dist.engine.serve import serve
from llama_dist.engine.session import Session
from llama_dist.engine.stats import EngineStats
from llama_dist.frontend.batch.blocks import block_size, claimed_lines
from llama_dist.frontend.batch.desk import Desk, Watch
from llama_dist.frontend.batch.drain import Drain
from llama_dist.frontend.batch.others import Others
from llama_dist.frontend.batch.outfile import Appender, Sink, Standard, part_path
from llama_dist.frontend.batch.prompts import Encoder
from llama_dist.frontend.batch.results import Names
from llama_dist.frontend.batch.survey import REPEATED, TODO, Survey
from llama_dist.frontend.monitor import Finished, Monitor
from llama_dist.parallel.claims import meet
from llama_dist.parallel.control import claim
from llama_dist.parallel.world import World

AHEAD, AHEAD_OF_MANY = 4, 2  # batches of requests in flight; fewer where another replica may be free for them sooner


@dataclass(frozen=True)
class Share:
    """The lines of the job, what its records are called by, and where they go (None: stdout)."""

    survey: Survey
    names: Names
    output: Path | None


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
        sink = _sink(world, work.output)
        desk = Desk(
            work.survey,
            _lines(world, work.survey),
            encoder,
            work.names,
            session.run.seed,
            sink,
            session.run.max_batch_size * (AHEAD if world.n_replicas == 1 else AHEAD_OF_MANY),
            drain,
            engine.validate,
            _watcher(world, work.output, monitor),
        )
        serve(world, engine, desk.inbox, desk.outbox)
        sink.close()
        served = Served(sink.exit_code if isinstance(sink, Standard) else 0, desk.complete)
    meet(world, "served")  # a slow replica is no dead one
    return served


def _watcher(world: World, output: Path | None, monitor: Monitor | None) -> Watch:
    """What hears of each tick: on rank 0 the monitor, which counts the other replicas' records too."""
    if monitor is None:
        return lambda stats, finished: None
    if world.n_replicas == 1 or output is None:
        return monitor.tick
    others = Others([part_path(output, replica) for replica in range(1, world.n_replicas)])

    def watch(stats: EngineStats, finished: Sequence[Finished]) -> None:
        done, failed = others.news()
        monitor.started_done += done
        monitor.started_failed += failed
        monitor.tick(stats, finished)

    return watch


def _sink(world: World, output: Path | None) -> Sink:
    if output is None:
        return Standard()
    return Appender(output if world.n_replicas == 1 else part_path(output, world.replica))


def _lines(world: World, survey: Survey) -> Iterator[tuple[int, bytes]]:
    left = survey.marks.count(TODO, 1) + survey.marks.count(REPEATED, 1)
    turn: Callable[[], int] = itertools.count().__next__
    if world.n_replicas > 1:
        turn = functools.partial(claim, world, "batch")
    return claimed_lines(survey, block_size(left, world.n_replicas), turn)
