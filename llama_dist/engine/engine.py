"""The tick: schedule, compute, draw, commit; the same on every rank of a replica.

Nothing here depends on a clock, a set's order or this rank's own memory, so all ranks take the same steps; a digest of
what was drawn is compared among them every few ticks. It knows token ids; text only where a stop string asks for it.
Where only tokens are asked for, a tick may compute those of the next ones too, which then take them (calls.py).
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from llama_dist.engine import sampler
from llama_dist.engine.answer import Answer
from llama_dist.engine.calls import Calls
from llama_dist.engine.draws import Drawing, begin, settle
from llama_dist.engine.fault import find_fault
from llama_dist.engine.foresight import Foreseen, Pass, next_tokens, passes_in_row
from llama_dist.engine.logits import shape
from llama_dist.engine.scheduler import Scheduler, Work
from llama_dist.engine.scores import Score, scores_of
from llama_dist.engine.stats import EngineStats
from llama_dist.errors import RequestError
from llama_dist.kernels.draw import MOST_K
from llama_dist.kernels.program import LEFT
from llama_dist.kernels.told import Told
from llama_dist.model.cache import KVCache, Span, lay
from llama_dist.model.transformer import Transformer
from llama_dist.parallel.control import check
from llama_dist.parallel.world import World
from llama_dist.request import Completion, FinishReason, Request, TokenEvent
from llama_dist.text.base import Tokenizer
from llama_dist.text.stop import StopMatcher

LOGIT_ROWS = 128  # prompt positions scored at a time, so that scoring needs no prompt x vocabulary buffer

BROKEN = -1  # in a token's place

OnToken = Callable[[TokenEvent], None]
Ended = tuple[int, Completion]  # by arrival


class Computed(NamedTuple):
    """A tick's work. Sequence i's tokens end before `ends[i]`; of all hidden states [n, dim], or what comes next."""

    batch: list[Work]
    ends: list[int]
    hidden: torch.Tensor | None
    after: list[int] | None = None  # a token for each of the batch, or BROKEN


@dataclass
class Engine:
    """A model, its cache and its queue. `stop_ids` end an answer and are no part of it. Not to be shared by threads."""

    model: Transformer
    cache: KVCache
    world: World
    scheduler: Scheduler
    tokenizer: Tokenizer
    stop_ids: frozenset[int]
    seed: int
    check_every: int
    foresees: bool
    """Begin the next pass before this one's tokens have been seen: for GPUs, which work on meanwhile."""
    calls: Calls = field(default_factory=Calls)
    """How many passes are one call where nothing but tokens is asked for: for CPUs."""
    answers: dict[str, Answer] = field(default_factory=dict)
    ticks: int = 0
    batch: int = 0
    prompt_tokens: int = 0
    new_tokens: int = 0
    cached_tokens: int = 0
    _foreseen: Foreseen | None = None
    _ahead: deque[Pass] = field(default_factory=deque)
    _digest: hashlib.blake2b = field(default_factory=lambda: hashlib.blake2b(digest_size=8))

    @property
    def idle(self) -> bool:
        return self.scheduler.idle

    @property
    def ahead(self) -> int:
        """Passes that are done, and that no tick has taken yet."""
        return len(self._ahead)

    def stats(self) -> EngineStats:
        """Counts since the start, and how full the batch and the cache are now."""
        table = self.scheduler.table
        return EngineStats(
            running=self.batch,
            waiting=len(self.scheduler.waiting),
            prompt_tokens=self.prompt_tokens,
            new_tokens=self.new_tokens,
            cached_tokens=self.cached_tokens,
            pages_held=table.n_held,
            pages_total=table.n_pages,
            preemptions=self.scheduler.n_preempted,
            ticks=self.ticks,
        )

    def validate(self, request: Request) -> None:
        """A RequestError naming the field where the request cannot be served."""
        length, longest = len(request.prompt), self.scheduler.max_seq_len
        if length == 0:
            raise RequestError("the prompt is empty, must have at least 1 token", "prompt")
        if length > longest:
            raise RequestError(
                f"the prompt has {length} tokens, more than max_seq_len {longest}; shorten it or raise --max_seq_len",
                "prompt",
            )
        params = request.params
        named = {
            "prompt": request.prompt,
            "logit_bias": [i for i, _ in params.logit_bias],
            "stop_token_ids": params.stop_token_ids,
            "allowed_token_ids": params.allowed_token_ids or (),
            "bad_words": [i for word in params.bad_words for i in word],
        }
        vocab = self.model.config.vocab_size
        for name, ids in named.items():
            bad = next((i for i in ids if not 0 <= i < vocab), None)
            if bad is not None:
                raise RequestError(f"{name} has token id {bad}, must be from 0 to {vocab - 1}", name)

    def add(self, request: Request) -> None:
        """Queue a validated request, whose id no other unfinished one has."""
        assert request.id not in self.answers, f"request id {request.id!r} is in use"
        params = request.params
        seed = params.seed if params.seed is not None else sampler.derive_seed(self.seed, request.id)
        stops = frozenset(params.stop_token_ids) | (frozenset() if params.ignore_eos else self.stop_ids)
        matcher = StopMatcher(self.tokenizer, params.stop) if params.stop else None
        self.answers[request.id] = Answer(self.scheduler.add(request), seed, stops, matcher)

    def cancel(self, *ids: str) -> list[Completion]:
        """Drop requests; what they had so far, in order of arrival. Unknown ids are passed over."""
        gone = self.scheduler.cancel(ids)
        if self.idle:
            self._ahead.clear()
        return [self.answers.pop(s.request.id).completion("cancelled") for s in gone]

    def step(self, on_token: OnToken | None = None) -> list[Completion]:
        """One tick; the requests that ended in it, in order of arrival. Every rank of the replica calls it alike."""
        if self.model.program is not None:  # most ticks ask next to nothing of torch: its mode would cost more
            return self._tick(on_token)
        with torch.inference_mode():
            return self._tick(on_token)

    def _tick(self, on_token: OnToken | None) -> list[Completion]:
        batch, ends, hidden, after = self._compute()
        self.batch = len(batch)
        done: list[Ended] = []
        drawing: list[tuple[Work, int]] = []
        for work, end in zip(batch, ends, strict=True):
            answer = self.answers[work.sequence.request.id]
            self._count(work)
            scores = work.sequence.request.params.scores_prompt
            if scores and hidden is not None and not self._score(answer, work, hidden[end - work.length : end]):
                done.append(self._break(answer, work))
            elif work.last and len(work.sequence.tokens) < work.sequence.limit:
                drawing.append((work, end - 1))
            else:
                self.scheduler.commit(work, None)
                if work.last:
                    done.append(self._end(answer, "length"))
        done += self._draw(drawing, hidden, after, on_token)
        self._check(done)
        return [completion for _, completion in sorted(done, key=lambda end: end[0])]

    def _compute(self) -> Computed:
        """What was done ahead is taken first, by itself: what has come in between can wait for that little."""
        seen, self._foreseen = self._foreseen, None
        if seen is not None and (rows := seen.rows()):
            return Computed([seen.works[row] for row in rows], [row + 1 for row in rows], seen.hidden)
        known = self._known()
        if known is not None:
            return known
        batch = self.scheduler.next_batch()
        passes = self._passes(batch)
        if passes == 1:
            hidden, ends = self._pass(batch)
            return Computed(batch, ends, hidden)
        self._go_on(batch, passes)
        known = self._known()
        assert known is not None, f"{passes} passes of {len(batch)} sequences found nothing"
        return known

    def _known(self) -> Computed | None:
        """The next of the passes that were one call, if it is of use to any sequence."""
        while self._ahead:
            done = self._ahead.popleft()
            if rows := done.rows():
                after = [done.after[row] for row in rows]
                return Computed([done.works[row] for row in rows], [*range(1, len(rows) + 1)], None, after)
        return None

    def _passes(self, batch: list[Work]) -> int:
        """In how many passes from here on only tokens are asked for, by the model's own logits; they are one call."""
        most = self.calls.passes(len(batch), sum(work.sequence.cached for work in batch))
        if most == 1 or not batch or self.foresees or not self.model.goes_on(len(batch), self.cache):
            return 1
        for work in batch:
            params = work.sequence.request.params
            if params.edits_logits or params.logprobs or self.answers[work.sequence.request.id].matcher is not None:
                return 1
            if params.temperature and params.top_k > MOST_K:  # the sampler's, and a call ends where it is asked
                return 1
        return self.scheduler.go_on(batch, most)

    def _go_on(self, batch: list[Work], passes: int) -> None:
        sequences = [work.sequence for work in batch]
        rows = [(Span(s.pages, s.cached, 1, s.prompt_len), s.tokens[-1:]) for s in sequences]
        answers = [self.answers[s.request.id] for s in sequences]
        stops = frozenset[int]().union(*(answer.stops for answer in answers))
        chances = None
        if any(s.request.params.temperature for s in sequences):
            chances = [sampler.chance(answer.sequence.request.params, answer.seed) for answer in answers]
        laid = lay(rows, self.world.device, passes - 1)
        after = self.model.run_on(laid, self.cache, passes, [*stops], chances)
        for i, token in enumerate(after[-1]):
            if token == LEFT:
                s, at = sequences[i], len(sequences[i].tokens) + len(after) - 1
                row = self.model.drawn_from(i).float()
                after[-1][i] = sampler.sample(row, s.request.params, answers[i].seed, at)
        self.scheduler.went_on(len(after))
        self._ahead.extend(passes_in_row(batch, after))

    def _pass(self, batch: list[Work], tokens: torch.Tensor | None = None) -> tuple[torch.Tensor, list[int]]:
        """Hidden states, and where each sequence's end. `tokens` [len(batch)]: on the device, not known here yet."""
        rows, ends, end = [], [], 0
        for work in batch:
            s, stop = work.sequence, work.start + work.length
            ids = s.tokens[work.start : stop] if tokens is None else [0]
            rows.append((Span(s.pages, work.start, work.length, s.prompt_len), ids))
            end += work.length
            ends.append(end)
        drawn = tokens is not None or (end == len(batch) and all(work.last for work in batch))
        return self.model(lay(rows, self.world.device), self.cache, drawn, tokens), ends

    def _count(self, work: Work) -> None:
        sequence = work.sequence
        if sequence.times_preempted == 0 and work.start == (sequence.hit or 0):
            self.cached_tokens += work.start
        self.prompt_tokens += max(0, min(work.start + work.length, sequence.prompt_len) - work.start)

    def _score(self, answer: Answer, work: Work, hidden: torch.Tensor) -> bool:
        """Logprobs of the prompt tokens that follow this chunk's; recomputed ones add nothing. False: not finite."""
        tokens, top = work.sequence.request.prompt, work.sequence.request.params.top_logprobs
        first = max(work.start + 1, len(answer.prompt_scores))
        last = min(work.start + work.length + 1, len(tokens))
        for start in range(first, last, LOGIT_ROWS):
            stop = min(start + LOGIT_ROWS, last)
            logits = self.model.logits(hidden[start - 1 - work.start : stop - 1 - work.start])
            if BROKEN in self.model.likeliest(logits):
                return False
            for logprob, tops in scores_of(logits, tokens[start:stop], [top] * (stop - start)):
                answer.prompt_scores.append(logprob)
                answer.prompt_tops += [tuple(tops)] if top else []
        return True

    def _draw(
        self,
        drawing: list[tuple[Work, int]],
        hidden: torch.Tensor | None,
        after: list[int] | None,
        on_token: OnToken | None,
    ) -> list[Ended]:
        """A token for each sequence that reached its newest one, `after` where it is known; those that end with it."""
        if not drawing:
            return []
        chosen: Sequence[int | RequestError]
        scores: dict[int, Score] = {}
        if hidden is not None:
            ends = [at for _, at in drawing]
            every = ends == [*range(hidden.shape[0])]
            greedy = every and not self.foresees and all(_is_greedy(work) for work, _ in drawing)
            after = self.model.greatest(hidden) if greedy else None
        if after is not None:
            assert len(after) == len(drawing), f"{len(after)} tokens for {len(drawing)} sequences"
            chosen = after
        else:
            assert hidden is not None, "neither tokens nor hidden states are known"
            logits = self.model.logits(hidden, None if every else ends)
            chosen = self._choose(drawing, logits)
            scores = self._scores(drawing, logits, chosen)
        done: list[Ended] = []
        for i, token in enumerate(chosen):
            work = drawing[i][0]
            answer = self.answers[work.sequence.request.id]
            if token == BROKEN:
                done.append(self._break(answer, work))
                continue
            if isinstance(token, RequestError):  # alone; all ranks see the same logits, so all come here
                self.scheduler.commit(work, None)
                done.append(self._end(answer, "error", str(token)))
                continue
            self._digest.update(f"{work.sequence.request.id}:{token};".encode())
            reason = self._take(answer, work, token, scores.get(i), on_token)
            if reason is not None:
                done.append(self._end(answer, reason))
        return done

    def _break(self, answer: Answer, work: Work) -> Ended:
        """The row's numbers are not finite: it fails alone, and nobody finds its pages. All ranks see it alike."""
        why = find_fault(self.model, self.world, work.sequence)
        self.scheduler.commit(work, None)
        self.scheduler.table.forget(work.sequence.pages)
        return self._end(answer, "error", why)

    def _choose(self, drawing: list[tuple[Work, int]], logits: torch.Tensor) -> list[int | RequestError]:
        """A row's token, BROKEN where its numbers are not finite, or why none may be drawn."""
        told = None
        if self.foresees and not any(work.sequence.request.params.logprobs for work, _ in drawing):
            told = Told(self.model.found(logits))
            logits = logits.clone()  # the next pass may overwrite them before the sampler has seen a row
        refused: dict[int, RequestError] = {}
        wanted: dict[int, sampler.Wanted] = {}
        for i, (work, _) in enumerate(drawing):
            sequence, params = work.sequence, work.sequence.request.params
            if params.temperature == 0 and not params.shapes_logits:
                continue
            answer, row = self.answers[sequence.request.id], logits[i]
            if params.shapes_logits:
                try:
                    row = shape(row, params, sequence.request.prompt, answer.tokens, answer.stops)
                except RequestError as err:
                    refused[i] = err
                    continue
            wanted[i] = sampler.Wanted(row, params, answer.seed, len(sequence.tokens))
        begun = begin([*wanted.values()])  # before anything waits for the device
        ahead = self._look_ahead(drawing, told, [*wanted], begun) if told is not None else None
        likeliest = told.tolist() if told is not None else self.model.likeliest(logits)
        chosen: list[int | RequestError] = [*likeliest]
        drawn = dict(zip(wanted, begun.wait(), strict=True))
        for i, token in drawn.items():
            if likeliest[i] != BROKEN:
                chosen[i] = settle(wanted[i], token)
        if ahead is not None:
            works, going, after = ahead
            self._foreseen = Foreseen(works, [drawn.get(i, likeliest[i]) for i in going], after)
        for i, why in refused.items():
            if likeliest[i] != BROKEN:
                chosen[i] = why
        return chosen

    def _look_ahead(
        self, drawing: list[tuple[Work, int]], told: Told, rows: list[int], begun: Drawing
    ) -> tuple[list[Work], list[int], torch.Tensor] | None:
        """Begin the next pass, if it is clear what it will be: its work, the rows it goes on from, what it leaves."""
        if begun.parts and self.world.mp_size > 1:
            return None  # what is too close to tell on one rank's device may not be on another's
        works = self.scheduler.foresee([work for work, _ in drawing])
        if not works:
            return None
        places = {work.sequence.arrival: i for i, (work, _) in enumerate(drawing)}
        going = [places[work.sequence.arrival] for work in works]
        return works, going, self._pass(works, next_tokens(told.there, begun, rows, going))[0]

    def _scores(
        self, drawing: list[tuple[Work, int]], logits: torch.Tensor, chosen: Sequence[int | RequestError]
    ) -> dict[int, Score]:
        """By row, where they are asked for: logprobs of the model's own distribution."""
        tokens, tops = {}, []
        for i, (token, (work, _)) in enumerate(zip(chosen, drawing, strict=True)):
            params = work.sequence.request.params
            if params.logprobs and isinstance(token, int) and token != BROKEN:
                tokens[i] = token
                tops.append(params.top_logprobs)
        if not tokens:
            return {}
        rows = logits if len(tokens) == logits.shape[0] else logits[[*tokens]]
        return dict(zip(tokens, scores_of(rows, [*tokens.values()], tops), strict=True))

    def _take(
        self, answer: Answer, work: Work, token: int, score: Score | None, on_token: OnToken | None
    ) -> FinishReason | None:
        """Put the drawn token to its answer; why the answer ends with it, if it does."""
        sequence, params = answer.sequence, answer.sequence.request.params
        self.new_tokens += 1
        if token in answer.stops:
            self.scheduler.commit(work, None)
            return "stop"
        self.scheduler.commit(work, token)
        logprob = None
        if score is not None:
            logprob, tops = score
            answer.logprobs.append(logprob)
            if params.top_logprobs:
                answer.tops.append(tuple(tops))
        if on_token is not None:
            on_token(TokenEvent(sequence.request.id, token, logprob))
        if answer.matcher is not None:
            answer.text_len = answer.matcher.push(token, armed=len(answer.tokens) >= params.min_tokens)
            if answer.text_len is not None:
                return "stop"
        return "length" if len(sequence.tokens) >= sequence.limit else None

    def _end(self, answer: Answer, reason: FinishReason, error: str | None = None) -> Ended:
        sequence = answer.sequence
        self.scheduler.finish(sequence)
        del self.answers[sequence.request.id]
        return sequence.arrival, answer.completion(reason, error)

    def _check(self, done: list[Ended]) -> None:
        self.ticks += 1
        if self.ticks % self.check_every == 0 or (done and self.idle):
            value = int.from_bytes(self._digest.digest(), "little") >> 1
            check(self.world, value, f"the tokens sampled up to tick {self.ticks}")


def _is_greedy(work: Work) -> bool:
    """Whether the likeliest token is all that is asked of the row's logits."""
    params = work.sequence.request.params
    return params.temperature == 0 and not params.shapes_logits and not params.logprobs
