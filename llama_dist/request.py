"""What is asked of the engine and what it answers. Only token ids; text is made and read above."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal

from llama_dist.errors import RequestError

FinishReason = Literal["stop", "length", "cancelled", "error"]


@dataclass(frozen=True)
class SamplingParams:
    """How one answer is sampled. Defaults are those of Llama 2's `generate`; names and meanings those of vLLM.

    - `temperature` 0 (greedy) or from 1e-5. `top_p` 0 to 1 keeps the nucleus. `top_k` 0 keeps all. `min_p` 0 to 1 drops
      tokens less likely than that share of the likeliest one.
    - `max_tokens` None: up to the sequence length. `min_tokens`: no end, of any kind, before so many.
    - `presence_penalty` and `frequency_penalty`, -2 to 2, are taken off the logits of tokens in the answer so far, once
      and per occurrence; `repetition_penalty`, 0.01 to 10, divides (negative: multiplies) those of tokens in prompt
      or answer.
    - `logit_bias`: (id, -100 to 100) added. `allowed_token_ids`: nothing else is drawn. `bad_words`: token sequences
      whose last token is not drawn after the others.
    - `stop`: strings that end the answer and are no part of it. `stop_token_ids` likewise. `ignore_eos`: the model's
      own stop ids are tokens like others.
    - `logprobs`: report each token's; `top_logprobs` 0 to 20: the likeliest alternatives too. `echo`: the answer begins
      with the prompt, scored too where `logprobs`. `prompt_logprobs`: the same scores without the echo.
    - `seed` None: derived from the run's seed and the request's id.
    """

    temperature: float = 0.6
    top_p: float = 0.9
    max_tokens: int | None = None
    logprobs: bool = False
    echo: bool = False
    seed: int | None = None
    min_tokens: int = 0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    top_logprobs: int = 0
    prompt_logprobs: bool = False
    allowed_token_ids: tuple[int, ...] | None = None
    bad_words: tuple[tuple[int, ...], ...] = ()

    def __post_init__(self) -> None:
        for name, low, high in _RANGES:
            _within(name, getattr(self, name), low, high)
        if 0 < self.temperature < 1e-5:  # logits divided by it would overflow
            raise RequestError(f"temperature is {self.temperature}, must be 0 or at least 1e-5", "temperature")
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise RequestError(
                f"min_tokens is {self.min_tokens}, must be at most max_tokens {self.max_tokens}", "min_tokens"
            )
        for _, bias in self.logit_bias:
            _within("logit_bias", bias, -100, 100)
        if any(not text for text in self.stop) or len(self.stop) > 16:
            raise RequestError("stop must be at most 16 strings, none of them empty", "stop")
        if self.allowed_token_ids is not None and not self.allowed_token_ids:
            raise RequestError("allowed_token_ids is empty, must name at least one token", "allowed_token_ids")
        if any(not word for word in self.bad_words):
            raise RequestError("bad_words has an empty word", "bad_words")

    @property
    def scores_prompt(self) -> bool:
        """Whether the prompt's own logprobs are asked for."""
        return self.prompt_logprobs or (self.echo and self.logprobs)

    @property
    def shapes_logits(self) -> bool:
        """Whether anything beyond temperature and top_p stands between the model's logits and the draw."""
        return bool(self.top_k or self.min_p or self.edits_logits)

    @property
    def edits_logits(self) -> bool:
        """Whether logits become others before filters are looked at."""
        return bool(
            self.presence_penalty
            or self.frequency_penalty
            or self.repetition_penalty != 1
            or self.logit_bias
            or self.allowed_token_ids is not None
            or self.bad_words
            or self.min_tokens
        )

    @staticmethod
    def from_json(data: dict[str, Any]) -> SamplingParams:
        """From what `dataclasses.asdict` gives after a trip through JSON, where tuples are lists."""
        return SamplingParams(**{key: _tuples(value) for key, value in data.items()})


def _tuples(value: Any) -> Any:
    return tuple(_tuples(v) for v in value) if isinstance(value, (list, tuple)) else value


_ANY = 2**62  # as good as no bound; a JSON number may be larger still, and no float holds that
_RANGES: tuple[tuple[str, float, float], ...] = (
    ("temperature", 0, _ANY),
    ("top_p", 0, 1),
    ("max_tokens", 0, _ANY),
    ("seed", 0, 2**63 - 1),
    ("min_tokens", 0, _ANY),
    ("top_k", 0, _ANY),
    ("min_p", 0, 1),
    ("presence_penalty", -2, 2),
    ("frequency_penalty", -2, 2),
    ("repetition_penalty", 0.01, 10),
    ("top_logprobs", 0, 20),
)


def _within(name: str, value: float | None, low: float, high: float) -> None:
    if value is None or low <= value <= high:  # never true of NaN
        return
    bounds = f"{low:g} or more" if high == _ANY and not value > high else f"from {low:g} to {high:g}"
    raise RequestError(f"{name} is {value}, must be {bounds}", name)


@dataclass(frozen=True)
class Request:
    """A prompt of token ids under an id that is unique in its run."""

    id: str
    prompt: tuple[int, ...]
    params: SamplingParams = field(default_factory=SamplingParams)

    def to_json(self) -> dict[str, Any]:
        return {"id": self.id, "prompt": list(self.prompt), "params": dataclasses.asdict(self.params)}

    @staticmethod
    def from_json(data: dict[str, Any]) -> Request:
        return Request(data["id"], tuple(data["prompt"]), SamplingParams.from_json(data["params"]))


@dataclass(frozen=True)
class Cancel:
    """Drop a request, queued or running; it ends with finish_reason "cancelled"."""

    id: str


@dataclass(frozen=True)
class Stop:
    """No more requests come: end when all are answered. With `cancel`, drop those that are not."""

    cancel: bool = False


@dataclass(frozen=True)
class TokenEvent:
    """One sampled token as it is drawn: for streaming. A stop string may still cut it off."""

    request_id: str
    token_id: int
    logprob: float | None


TopLogprobs = tuple[tuple[int, float], ...]
"""(token id, logprob) of the likeliest tokens of one place, the likeliest first."""


@dataclass(frozen=True)
class Completion:
    """A finished answer: its tokens, without the stop token that ended it.

    With `echo`, `token_ids`, `logprobs` and `top_logprobs` begin with the prompt, whose first token has logprob 0.0 and
    no alternatives. Logprobs are natural logs of the unscaled model distribution (no temperature, no filters). A stop
    string is cut off the text by `text_len`: the characters of the decoded answer that stand. `cached_tokens`: prompt
    tokens found in the prefix cache. `error`: why the request failed, with finish_reason "error".
    """

    request_id: str
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...] | None
    finish_reason: FinishReason
    top_logprobs: tuple[TopLogprobs, ...] | None = None
    prompt_logprobs: tuple[float, ...] | None = None
    text_len: int | None = None
    cached_tokens: int = 0
    error: str | None = None

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @staticmethod
    def from_json(data: dict[str, Any]) -> Completion:
        return Completion(**{key: _tuples(value) for key, value in data.items()})
