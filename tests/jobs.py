"""What the tests run on every rank (by tests/spmd.py): a session a checkpoint, and answers as plain lists."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from llama_dist.config import RunConfig
from llama_dist.engine.session import Session, complete, open_session
from llama_dist.request import Request, SamplingParams

Answer = tuple[list[int], list[float], str]


@dataclass(frozen=True)
class Ask:
    """Prompts for one checkpoint, and how to run it. `run` overrides RunConfig, `params` SamplingParams."""

    folder: str
    prompts: Sequence[Sequence[int]]
    max_tokens: int
    run: dict[str, Any] = field(default_factory=dict)
    params: dict[str, Any] = field(default_factory=dict)


def open_for(ask: Ask) -> Session:
    options = {"dtype": "float32", "device": "cpu", "max_seq_len": 96, "check_every": 1, "timeout": 60.0, **ask.run}
    return open_session(RunConfig(ckpt_dir=ask.folder, **options))


def answers(asks: Sequence[Ask]) -> list[list[Answer]]:
    """For each ask the answers to its prompts: tokens and logprobs (the prompt's too by default), and why it ended."""
    return [answer(open_for(ask), ask) for ask in asks]


def answer(session: Session, ask: Ask) -> list[Answer]:
    options = {"temperature": 0.0, "logprobs": True, "echo": True, **ask.params}
    params = SamplingParams(max_tokens=ask.max_tokens, **options)
    requests = [Request(f"{i}", tuple(ids), params) for i, ids in enumerate(ask.prompts)]
    done = complete(session, requests)
    return [(list(c.token_ids), list(c.logprobs or ()), c.finish_reason) for c in done]
