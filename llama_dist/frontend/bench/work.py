"""The work that is timed, on an open session: decoding, prefill, a mixed batch. Every rank calls these alike.

How many steps are taken depends on the requests alone, never on a clock. Prompts are random and none comes twice, so
that no prefix cache helps.
"""

from __future__ import annotations

import itertools
import math
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch

from llama_dist.engine.serve import Message, serve
from llama_dist.engine.session import Session
from llama_dist.model.cache import PAGE_SIZE
from llama_dist.request import Completion, Request, SamplingParams, Stop

PROMPT = 128  # tokens of the prompts before decoding is timed
WARM = 2  # steps before
STEPS = {1: 64, 8: 32, 64: 16}
"""Batches whose decoding is timed, and for how many steps."""
SAMPLED = (1, 64)  # batches that are decoded at Llama's temperature and top_p, the defaults, too
PREFILL = (512, 2048, 8192)
MIXED, MIXED_NEW = 64, 64  # prompts of the mixed batch, and new tokens of each
MIXED_PROMPTS = (16, 256)


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@dataclass
class Player:
    """A session and a number for the next request."""

    session: Session
    serial: Iterator[int] = field(default_factory=itertools.count)

    def requests(self, lengths: Sequence[int], new: int | None, temperature: float = 0.0) -> list[Request]:
        """Requests with random prompts of so many tokens, that go on whatever is drawn."""
        params = SamplingParams(temperature=temperature, max_tokens=new, ignore_eos=True)
        vocab = self.session.config.vocab_size
        made = []
        for length in lengths:
            number = next(self.serial)
            made.append(Request(f"bench-{number}", random_prompt(number, length, vocab), params))
        return made

    def no_room(self, sequences: int, length: int) -> str | None:
        """Why so many sequences of so many tokens cannot be run at once; None where they can."""
        scheduler = self.session.engine.scheduler
        if sequences > scheduler.max_batch_size:
            return f"needs a batch of {sequences}, have {scheduler.max_batch_size}"
        if length > scheduler.max_seq_len:
            return f"needs --max_seq_len {length}, have {scheduler.max_seq_len}"
        pages = sequences * -(-length // PAGE_SIZE)
        if pages > scheduler.table.n_pages:
            return f"needs a cache of {pages * PAGE_SIZE} tokens, have {scheduler.table.n_pages * PAGE_SIZE}"
        return None

    def until_idle(self, requests: Sequence[Request]) -> float:
        """Seconds to answer them."""
        engine, device = self.session.engine, self.session.world.device
        synchronize(device)
        began = time.perf_counter()
        for request in requests:
            engine.add(request)
        while not engine.idle:
            engine.step()
        synchronize(device)
        return time.perf_counter() - began

    def first_token(self) -> None:
        """Answer a short prompt with one token."""
        self.until_idle(self.requests([16], 1))

    def decoding(self, batch: int, context: int = PROMPT, warm: int = WARM, temperature: float = 0.0) -> None:
        """Start `batch` sequences, step until each has its prompt of `context` tokens behind it, then `warm` times."""
        engine = self.session.engine
        for request in self.requests([context] * batch, None, temperature):
            engine.add(request)
        scheduler = engine.scheduler
        while scheduler.waiting or any(sequence.missing > 1 for sequence in scheduler.running):
            engine.step()
        self.steps(warm)

    def steps(self, n: int) -> float:
        """Seconds of `n` steps, passes done before or for later ones left out of account; NaN if all were before."""
        engine, device = self.session.engine, self.session.world.device
        synchronize(device)
        before, began = engine.ahead, time.perf_counter()
        for _ in range(n):
            engine.step()
        synchronize(device)
        passes = n - before + engine.ahead
        return (time.perf_counter() - began) * n / passes if passes else math.nan

    def drop(self) -> None:
        """End what runs."""
        engine = self.session.engine
        engine.cancel(*engine.answers)

    def decode(
        self, batch: int, context: int = PROMPT, steps: int | None = None, temperature: float = 0.0
    ) -> tuple[float, float]:
        """Tokens a second of `batch` sequences, and their average length meanwhile; top_p is the default."""
        self.decoding(batch, context, temperature=temperature)
        n = steps or STEPS[batch]
        lengths = [len(sequence.tokens) for sequence in self.session.engine.scheduler.running]
        assert len(lengths) == batch, f"{len(lengths)} of {batch} sequences run"
        seconds = self.steps(n)
        self.drop()
        return batch * n / seconds, sum(lengths) / batch + (n - 1) / 2

    def decode_rate(self, batch: int) -> float:
        """The rate of `decode` alone."""
        return self.decode(batch)[0]

    def prefill(self, n: int) -> float:
        """Prompt tokens a second of one prompt of `n` tokens, its first new token included."""
        # A prompt as long as a sequence may be leaves no room for that one.
        new = 1 if n < self.session.engine.scheduler.max_seq_len else 0
        return n / self.until_idle(self.requests([n], new))

    def mixed(self) -> float:
        """New tokens a second of a batch of prompts of all lengths, served as `batch` does: with a share every tick."""
        session = self.session
        requests = self.requests(mixed_lengths(), MIXED_NEW)
        inbox: list[Message] = [*requests, Stop()]
        done: list[Completion] = []

        def take(idle: bool) -> list[Message]:
            taken = list(inbox)
            inbox.clear()
            return taken

        synchronize(session.world.device)
        began = time.perf_counter()
        serve(session.world, session.engine, take, lambda completions, stats: done.extend(completions))
        synchronize(session.world.device)
        seconds = time.perf_counter() - began
        return MIXED * MIXED_NEW / seconds


def random_prompt(number: int, length: int, vocab: int) -> tuple[int, ...]:
    """The prompt of that number, the same every time."""
    draw = random.Random(number)
    return tuple(draw.randrange(vocab) for _ in range(length))


def mixed_lengths() -> list[int]:
    """Prompt lengths of the mixed batch, the same every time."""
    least, most = MIXED_PROMPTS
    draw = random.Random(7)
    return [draw.randint(least, most) for _ in range(MIXED)]
