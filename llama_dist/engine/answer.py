"""What an answer gathers while its sequence runs, beside the tokens themselves."""

from __future__ import annotations

from dataclasses import dataclass, field

from llama_dist.engine.scheduler import Sequence
from llama_dist.request import Completion, FinishReason, TopLogprobs
from llama_dist.text.stop import StopMatcher


@dataclass
class Answer:
    """`stops`: ids that end it. `prompt_scores[i]`: logprob of prompt token i given those before it."""

    sequence: Sequence
    seed: int
    stops: frozenset[int]
    matcher: StopMatcher | None
    logprobs: list[float] = field(default_factory=list)
    tops: list[TopLogprobs] = field(default_factory=list)
    prompt_scores: list[float] = field(default_factory=lambda: [0.0])
    prompt_tops: list[TopLogprobs] = field(default_factory=lambda: [()])
    text_len: int | None = None

    @property
    def tokens(self) -> list[int]:
        """The answer so far, without the prompt."""
        return self.sequence.tokens[self.sequence.prompt_len :]

    def completion(self, finish_reason: FinishReason, error: str | None = None) -> Completion:
        """The answer as it stands, ended for this reason."""
        request, params = self.sequence.request, self.sequence.request.params
        whole = params.echo and error is None
        tokens = self.sequence.tokens if whole else self.tokens
        prompt_scores = tuple(self.prompt_scores)
        logprobs = tuple(self.logprobs)
        tops = tuple(self.tops)
        if whole:
            logprobs, tops = prompt_scores + logprobs, tuple(self.prompt_tops) + tops
        reported = params.logprobs and error is None and finish_reason != "cancelled"
        assert not reported or len(logprobs) == len(tokens), f"{len(logprobs)} logprobs of {len(tokens)} tokens"
        return Completion(
            request.id,
            tuple(tokens),
            logprobs if reported else None,
            finish_reason,
            tops if reported and params.top_logprobs else None,
            prompt_scores if params.prompt_logprobs and error is None else None,
            self.text_len,
            self.sequence.hit or 0,
            error,
        )
