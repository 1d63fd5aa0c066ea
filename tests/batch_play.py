"""A batch job without a model, for test_batch_job.py: real files, an engine that answers from the request alone."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from llama_dist.config import RunConfig
from llama_dist.engine.stats import EngineStats
from llama_dist.frontend.batch import outfile
from llama_dist.frontend.batch.blocks import claimed_lines
from llama_dist.frontend.batch.desk import Desk
from llama_dist.frontend.batch.drain import Drain
from llama_dist.frontend.batch.job import Job, conclude, open_job
from llama_dist.frontend.batch.outfile import Appender, part_path
from llama_dist.frontend.batch.prompts import Encoder
from llama_dist.frontend.options import BatchOptions
from llama_dist.frontend.tally import Finished
from llama_dist.request import Completion, Request, Stop
from llama_dist.text.tokenizer import PieceTokenizer

STATS = EngineStats(0, 0, 0, 0, 0, 0, 0, 0, 0)
TOKENIZER = PieceTokenizer(
    "bytes",
    256,
    None,
    None,
    -1,
    frozenset(),
    {},
    False,
    None,
    lambda s: list(s.encode()),
    [bytes([b]) for b in range(256)],
)
ENCODER = Encoder(TOKENIZER, 256, 64, None, "no chat here")


def checked(**config: Any) -> Any:
    """What of a checkpoint a job asks: its config and tensors."""
    reader = SimpleNamespace(config=SimpleNamespace(**config), tensors={})
    return SimpleNamespace(reader=reader, tokenizer=TOKENIZER, dtype=torch.float32, max_seq_len=64, reproducible=False)


def options(source: Path, output: Path, **flags: Any) -> BatchOptions:
    run = RunConfig("models/tiny", **{k: flags.pop(k) for k in ("seed", "dtype", "reproducible") if k in flags})
    return BatchOptions(run, str(source), str(output), **flags)


def opened(source: Path, output: Path, encoder: Encoder = ENCODER, **flags: Any) -> Job:
    return open_job(options(source, output, **flags), checked(), encoder, source)


@dataclass
class Engine:
    """Answers `per_tick` requests a tick, newest first, with the first bytes of the prompt upside down."""

    per_tick: int = 3
    queue: list[Request] = field(default_factory=list)
    stopping: bool = False
    answered: int = 0
    answers: list[str] = field(default_factory=list)
    called_off: list[str] = field(default_factory=list)
    most: int = 0

    def answer(self, request: Request) -> Completion:
        self.answers.append(request.id)
        tokens = tuple(reversed(request.prompt))[: request.params.max_tokens]
        if request.prompt[:4] == tuple(b"boom"):
            return Completion(request.id, (), None, "error", error="a NaN on rank 0")
        return Completion(request.id, tokens, None, "length")

    def run(self, desk: Desk, ticks: int = 10**9) -> None:
        for _ in range(ticks):
            for message in desk.inbox(not self.queue):
                if isinstance(message, Stop):
                    self.stopping = True
                    if message.cancel:
                        desk.outbox([Completion(r.id, (), None, "cancelled") for r in self.queue], STATS)
                        self.called_off += [r.id for r in self.queue]
                        self.queue.clear()
                else:
                    assert all(r.id != message.id for r in self.queue)
                    self.queue.append(message)
            self.most = max(self.most, len(self.queue))
            done = [self.answer(self.queue.pop()) for _ in range(min(self.per_tick, len(self.queue)))]
            self.answered += len(done)
            desk.outbox(done, STATS)
            if self.stopping and not self.queue:
                return


def desk_for(
    job: Job,
    sink: Any,
    claim: Callable[[], int] | None = None,
    size: int = 4,
    drain: Drain | None = None,
    told: list[Finished] | None = None,
    ahead: int = 8,
) -> Desk:
    def watch(stats: EngineStats, finished: Sequence[Finished]) -> None:
        if told is not None:
            told.extend(finished)

    turn = iter(range(10**9)).__next__ if claim is None else claim
    lines = claimed_lines(job.survey, size, turn)
    drain = drain or Drain(threading.Event(), None, 0)
    return Desk(job.survey, lines, ENCODER, job.names, 1, sink, ahead, drain, lambda request: None, watch)


def finish(source: Path, output: Path, ordered: bool = False, replicas: int = 1, **flags: Any) -> bool:
    """A whole run of the command; whether the job is complete after it."""
    job = opened(source, output, **flags)
    assert job.lock is not None
    try:
        complete = job.finished
        if not complete and replicas == 1:
            sink = Appender(output)
            desk = desk_for(job, sink)
            Engine().run(desk)
            sink.close()
            complete = desk.complete
        elif not complete:
            turn = iter(range(10**9)).__next__
            desks = [desk_for(job, Appender(part_path(output, r)), turn) for r in range(replicas)]
            engines = [Engine(per_tick=r + 1) for r in range(replicas)]
            while not all(e.stopping and not e.queue for e in engines):
                for desk, engine in zip(desks, engines, strict=True):
                    if not (engine.stopping and not engine.queue):
                        engine.run(desk, ticks=1)
        return conclude(output, job.survey, ordered, complete)[0]
    finally:
        job.lock.release()


def write_input(path: Path, n: int, **more: str) -> Path:
    """`n` lines, some bad, one blank, one repeated, one that fails in the engine; `more` lines after them."""
    lines: list[str] = []
    for i in range(1, n + 1):
        entry: Any = {"custom_id": f"id-{i}", "prompt": f"prompt {i}", "max_tokens": i % 7}
        if i % 5 == 2:
            entry["n"] = 2
        lines.append(json.dumps(entry))
    lines[2:3] = ["not json"]
    lines[5:6] = [""]
    lines[7:8] = [json.dumps({"custom_id": "id-1", "prompt": "again"})]
    lines[8:9] = [json.dumps({"prompt": "boom"})]
    path.write_text("\n".join([*lines, *more.values()]) + "\n")
    return path


class Killed(BaseException):
    """Stands for kill -9: nothing catches it, nothing is written after it."""


class Kill:
    """Ends the process, so to speak, at the `at`-th system call that changes the disk, or half-way through a write."""

    CALLS = ("write", "fsync", "replace", "unlink", "ftruncate")

    def __init__(self, monkeypatch: Any, at: int) -> None:
        self.left = at
        self.dead = False
        real = {name: getattr(os, name) for name in self.CALLS}

        def call(name: str, *args: Any) -> Any:
            if self.dead:
                raise Killed(name)
            self.left -= 1
            if self.left == 0:
                self.dead = True
                if name == "write":
                    real["write"](args[0], args[1][: len(args[1]) // 2])
                raise Killed(name)
            return real[name](*args)

        fake = SimpleNamespace(**{name: getattr(os, name) for name in dir(os)})
        for name in self.CALLS:
            setattr(fake, name, lambda *args, name=name: call(name, *args))
        monkeypatch.setattr(outfile, "os", fake)
