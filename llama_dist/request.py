"""What is asked of the engine and what it answers. Only token ids; text is made and read above."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any, Literal

from llama_dist.errors import RequestError

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class SamplingParams:
    """How one answer is sampled. Defaults are those of Llama 2's `generate`.

    `temperature` 0 is greedy; `top_p` 0 to 1 keeps the nucleus; `max_tokens` None: up to the sequence length.
    `seed` None: derived from the run's seed and the request's id.
    """

    temperature: float = 0.6
    top_p: float = 0.9
    max_tokens: int | None = None
    logprobs: bool = False
    echo: bool = False
    seed: int | None = None

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise RequestError(f"temperature is {self.temperature}, must be 0 or more", "temperature")
        if not 0 <= self.top_p <= 1:
            raise RequestError(f"top_p is {self.top_p}, must be from 0 to 1", "top_p")
        if self.max_tokens is not None and self.max_tokens < 0:
            raise RequestError(f"max_tokens is {self.max_tokens}, must be 0 or more", "max_tokens")
        if self.seed is not None and not 0 <= self.seed < 2**63:
            raise RequestError(f"seed is {self.seed}, must be from 0 to 2**63 - 1", "seed")


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
        return Request(data["id"], tuple(data["prompt"]), SamplingParams(**data["params"]))


@dataclass(frozen=True)
class TokenEvent:
    """One sampled token as it is drawn: for streaming."""

    request_id: str
    token_id: int
    logprob: float | None


@dataclass(frozen=True)
class Completion:
    """A finished answer. With `echo` both lists begin with the prompt; the first prompt token has logprob 0.0.

    `logprobs` are natural logs of the unscaled model distribution (no temperature, no nucleus). The stop token is
    in neither list.
    """

    request_id: str
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...] | None
    finish_reason: FinishReason

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @staticmethod
    def from_json(data: dict[str, Any]) -> Completion:
        logprobs = None if data["logprobs"] is None else tuple(data["logprobs"])
        return Completion(data["request_id"], tuple(data["token_ids"]), logprobs, data["finish_reason"])
