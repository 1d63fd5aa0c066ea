"""The loop that turns requests into completions, the same on every rank of a replica.

Each tick admits waiting requests into free slots, runs their prompts whole beside the newest tokens of the running
ones, and samples. Nothing here depends on a clock, a set's order or this rank's own memory, so all ranks take the same
steps; a digest of what was sampled is compared among them every few ticks. It knows token ids only, no text.
"""

from __future__ import annotations

import hashlib
import heapq
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from llama_dist.engine.sampler import derive_seed, logprobs_of, sample
from llama_dist.errors import RequestError
from llama_dist.model.cache import KVCache, Span, make_batch
from llama_dist.model.transformer import Transformer
from llama_dist.parallel.control import check
from llama_dist.parallel.world import World
from llama_dist.request import Completion, FinishReason, Request, TokenEvent

TICK_TOKENS = 2048  # prompts are admitted to a tick up to so many tokens, one prompt at least
LOGIT_ROWS = 128  # prompt positions scored at a time, so that scoring needs no prompt x vocabulary buffer

OnToken = Callable[[TokenEvent], None]


@dataclass
class Running:
    """One admitted request: its tokens so far, prompt first, and where it must stop."""

    request: Request
    slot: int
    limit: int
    seed: int
    tokens: list[int]
    logprobs: list[float] = field(default_factory=list)
    cached: int = 0
    finish_reason: FinishReason | None = None

    @property
    def scores_prompt(self) -> bool:
        return self.request.params.echo and self.request.params.logprobs

    @property
    def wants_token(self) -> bool:
        return len(self.tokens) < self.limit


@dataclass(frozen=True)
class Engine:
    """A model with its cache, and the run's bounds. `stop_ids` end an answer and are no part of it."""

    model: Transformer
    cache: KVCache
    world: World
    max_batch_size: int
    max_seq_len: int
    stop_ids: frozenset[int]
    seed: int
    check_every: int

    def validate(self, request: Request) -> None:
        """A RequestError naming the field where the request cannot be served."""
        length, vocab = len(request.prompt), self.model.config.vocab_size
        if length == 0:
            raise RequestError("the prompt is empty, must have at least 1 token", "prompt")
        if length > self.max_seq_len:
            raise RequestError(
                f"the prompt has {length} tokens, more than max_seq_len {self.max_seq_len}; "
                "shorten it or raise --max_seq_len",
                "prompt",
            )
        bad = next((t for t in request.prompt if not 0 <= t < vocab), None)
        if bad is not None:
            raise RequestError(f"the prompt has token id {bad}, must be from 0 to {vocab - 1}", "prompt")

    @torch.inference_mode()
    def run(self, requests: Sequence[Request], on_token: OnToken | None = None) -> list[Completion]:
        """Serve all requests; completions in their order. Every rank of the replica calls it with the same ones."""
        for request in requests:
            self.validate(request)
        waiting = deque(requests)
        running: list[Running] = []
        free = list(range(self.max_batch_size))
        done: dict[str, Completion] = {}
        digest, ticks = hashlib.blake2b(digest_size=8), 0
        while waiting or running:
            running += self._admit(waiting, free)
            sampled = self._step(running, on_token)
            digest.update(repr(sampled).encode())
            ticks += 1
            for seq in [s for s in running if s.finish_reason is not None]:
                heapq.heappush(free, seq.slot)
                running.remove(seq)
                done[seq.request.id] = _completion(seq)
            if ticks % self.check_every == 0 or not (waiting or running):
                value = int.from_bytes(digest.digest(), "little") >> 1
                check(self.world, value, f"the tokens sampled up to tick {ticks}")
        return [done[request.id] for request in requests]

    def _admit(self, waiting: deque[Request], free: list[int]) -> list[Running]:
        admitted: list[Running] = []
        tokens = 0
        while waiting and free and (not admitted or tokens + len(waiting[0].prompt) <= TICK_TOKENS):
            request = waiting.popleft()
            params, length = request.params, len(request.prompt)
            limit = self.max_seq_len
            if params.max_tokens is not None:
                limit = min(limit, length + params.max_tokens)
            seed = params.seed if params.seed is not None else derive_seed(self.seed, request.id)
            admitted.append(Running(request, heapq.heappop(free), limit, seed, list(request.prompt)))
            tokens += length
        return admitted

    def _step(self, running: list[Running], on_token: OnToken | None) -> list[tuple[str, int]]:
        """One forward pass and one token for every running sequence that wants one."""
        rows = []
        for seq in running:
            span = Span(seq.slot, seq.cached, len(seq.tokens) - seq.cached, len(seq.request.prompt))
            rows.append((span, seq.tokens[seq.cached :]))
        hidden = self.model(make_batch(rows, self.world.device), self.cache)
        ends, end = [], 0
        for seq, (span, _) in zip(running, rows, strict=True):
            if seq.cached == 0 and seq.scores_prompt:
                seq.logprobs = self._score(hidden[end : end + span.length], seq.tokens)
            end += span.length
            seq.cached += span.length
            ends.append(end - 1)
        drawing = [(seq, last) for seq, last in zip(running, ends, strict=True) if seq.wants_token]
        sampled = []
        if drawing:
            logits = self.model.logits(hidden[[last for _, last in drawing]])
            for row, (seq, _) in zip(logits, drawing, strict=True):
                sampled.append((seq.request.id, self._draw(seq, row, on_token)))
        for seq in running:
            if seq.finish_reason is None and not seq.wants_token:
                seq.finish_reason = "length"
        return sampled

    def _score(self, hidden: torch.Tensor, tokens: list[int]) -> list[float]:
        """Logprob of each prompt token given those before it; the first, given nothing, counts 0."""
        scores = [0.0]
        for start in range(0, len(tokens) - 1, LOGIT_ROWS):
            stop = min(start + LOGIT_ROWS, len(tokens) - 1)
            logits = self.model.logits(hidden[start:stop])
            targets = torch.tensor(tokens[start + 1 : stop + 1], device=logits.device)
            scores += logprobs_of(logits, targets).tolist()
        return scores

    def _draw(self, seq: Running, logits: torch.Tensor, on_token: OnToken | None) -> int:
        params = seq.request.params
        token = sample(logits, params.temperature, params.top_p, seq.seed, len(seq.tokens))
        if token in self.stop_ids:
            seq.finish_reason = "stop"
            return token
        logprob = None
        if params.logprobs:
            logprob = float(logprobs_of(logits[None], torch.tensor([token], device=logits.device)))
            seq.logprobs.append(logprob)
        seq.tokens.append(token)
        if on_token is not None:
            on_token(TokenEvent(seq.request.id, token, logprob))
        return token


def _completion(seq: Running) -> Completion:
    assert seq.finish_reason is not None
    params = seq.request.params
    tokens = seq.tokens if params.echo else seq.tokens[len(seq.request.prompt) :]
    logprobs = tuple(seq.logprobs) if params.logprobs else None
    assert logprobs is None or len(logprobs) == len(tokens), f"{len(logprobs or ())} logprobs, {len(tokens)} tokens"
    return Completion(seq.request.id, tuple(tokens), logprobs, seq.finish_reason)
