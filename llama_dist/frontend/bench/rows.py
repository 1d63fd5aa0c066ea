"""The host's side of a batch job without its model: lines are read, scheduled, answered at once, written and ordered.

All of it but the answers is what `batch` runs; a token costs nothing here.
"""

from __future__ import annotations

import json
import tempfile
import threading
import time
from pathlib import Path

from llama_dist.engine.pages import PageTable
from llama_dist.engine.scheduler import Scheduler
from llama_dist.engine.stats import EngineStats
from llama_dist.frontend.batch.blocks import block_size, claimed_lines
from llama_dist.frontend.batch.desk import Desk
from llama_dist.frontend.batch.drain import Drain
from llama_dist.frontend.batch.job import conclude
from llama_dist.frontend.batch.outfile import Appender
from llama_dist.frontend.batch.prompts import Encoder
from llama_dist.frontend.batch.results import Names
from llama_dist.frontend.batch.serving import AHEAD
from llama_dist.frontend.batch.survey import survey
from llama_dist.request import Completion, Request
from llama_dist.text.ids import ids_tokenizer

ROWS = tuple(10**n for n in range(2, 7))
WORDS = 1000  # of the vocabulary
PROMPT, NEW = 16, 4  # tokens
BATCH, LENGTH, PAGE = 64, 64, 16
PAGES = 4 * BATCH * LENGTH // PAGE


class Answers:
    """Takes requests, gives each NEW tokens in as many ticks, as the engine does."""

    def __init__(self) -> None:
        self.scheduler = Scheduler(PageTable(PAGES, PAGE), BATCH, 2048, LENGTH, prefix_caching=True)

    def validate(self, request: Request) -> None:
        """Every request will do."""

    def add(self, request: Request) -> None:
        self.scheduler.add(request)

    def step(self) -> list[Completion]:
        done = []
        for work in self.scheduler.next_batch():
            sequence = work.sequence
            if not work.last:
                self.scheduler.commit(work, None)
                continue
            self.scheduler.commit(work, len(sequence.tokens) % WORDS)
            if len(sequence.tokens) == sequence.limit:
                self.scheduler.finish(sequence)
                tokens = tuple(sequence.tokens[sequence.prompt_len :])
                done.append(Completion(sequence.request.id, tokens, None, "length"))
        return done

    def stats(self) -> EngineStats:
        table, n = self.scheduler.table, len(self.scheduler.running)
        return EngineStats(n, len(self.scheduler.waiting), 0, 0, 0, table.n_held, table.n_pages, 0, 0)


def write_input(path: Path, n: int) -> None:
    """`n` lines; the custom_ids and prompts all differ."""
    with open(path, "w") as file:
        for i in range(n):
            prompt = [i // WORDS**k % WORDS for k in range(PROMPT)]
            line = {"custom_id": f"row-{i}", "prompt": prompt, "max_tokens": NEW, "temperature": 0, "ignore_eos": True}
            file.write(json.dumps(line) + "\n")


def serve_file(source: Path, output: Path) -> int:
    """Answer every line of a file into `output`, in the order of the input at the end; the lines written."""
    found = survey(source)
    encoder = Encoder(ids_tokenizer(WORDS), WORDS, LENGTH, None, "")
    sink, answers = Appender(output), Answers()
    taken = iter(range(found.n_lines + 1))
    lines = claimed_lines(found, block_size(found.n_lines, 1), taken.__next__)
    desk = Desk(
        found,
        lines,
        encoder,
        Names("0" * 16, "bench"),
        1,
        sink,
        BATCH * AHEAD,
        Drain(threading.Event(), None, 0.0),
        answers.validate,
        lambda stats, finished: None,
    )
    while not desk.complete:
        for message in desk.inbox(answers.scheduler.idle):
            if isinstance(message, Request):
                answers.add(message)
        done = [] if answers.scheduler.idle else answers.step()
        desk.outbox(done, answers.stats())
    sink.close()
    conclude(output, found, True, True)
    return desk.written


def time_rows(n: int) -> float:
    """Seconds to serve a file of `n` lines, from opening the input to the ordered output."""
    with tempfile.TemporaryDirectory(prefix="llama_dist-bench-") as folder:
        source = Path(folder) / "in.jsonl"
        write_input(source, n)
        began = time.perf_counter()
        written = serve_file(source, Path(folder) / "out.jsonl")
        seconds = time.perf_counter() - began
    assert written == n, f"{written} of {n} lines were written"
    return seconds
