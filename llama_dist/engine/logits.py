"""From a model's logits to those a token is drawn from: penalties, biases, bans. One row, float32, on every rank alike.

Penalties as in OpenAI's API (presence, frequency: over the answer) and CTRL (repetition: over prompt and answer, Keskar
et al. 2019). Bans come last, so that nothing lifts them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

import torch

from llama_dist.errors import RequestError
from llama_dist.request import SamplingParams

NEVER = float("-inf")


def shape(
    logits: torch.Tensor, params: SamplingParams, prompt: Sequence[int], answer: Sequence[int], stops: Iterable[int]
) -> torch.Tensor:
    """A row [vocab], as float32, with the request's penalties, biases and bans; no `stops` before `min_tokens`."""
    row = logits.to(torch.float32, copy=True)
    if params.repetition_penalty != 1:
        ids = _ids({*prompt, *answer}, row)
        seen = row[ids]
        row[ids] = torch.where(seen > 0, seen / params.repetition_penalty, seen * params.repetition_penalty)
    if answer and (params.presence_penalty or params.frequency_penalty):
        counts = Counter(answer)
        times = torch.tensor([counts[i] for i in sorted(counts)], dtype=row.dtype, device=row.device)
        row[_ids(counts, row)] -= params.presence_penalty + params.frequency_penalty * times
    if params.logit_bias:
        biased, by = zip(*params.logit_bias, strict=True)
        row.index_add_(0, torch.tensor(biased, device=row.device), torch.tensor(by, dtype=row.dtype, device=row.device))
    if params.allowed_token_ids is not None:
        allowed = _ids(params.allowed_token_ids, row)
        kept = row[allowed]
        row.fill_(NEVER)
        row[allowed] = kept
    banned = {word[-1] for word in params.bad_words if _ends_with(prompt, answer, word[:-1])}
    if len(answer) < params.min_tokens:
        banned |= set(stops)
    if banned:
        row[_ids(banned, row)] = NEVER
    bans = params.allowed_token_ids is not None or bool(banned)
    if bans and not bool((row > NEVER).any()):
        raise RequestError("no token may be drawn: allowed_token_ids, bad_words and min_tokens leave none")
    return row


def _ids(tokens: Iterable[int], row: torch.Tensor) -> torch.Tensor:
    return torch.tensor(sorted(set(tokens)), dtype=torch.int64, device=row.device)


def _ends_with(prompt: Sequence[int], answer: Sequence[int], beginning: Sequence[int]) -> bool:
    """Whether the sequence so far ends with the tokens before a banned word's last one."""
    n = len(beginning)
    tail = [*prompt[-n:], *answer[-n:]][-n:] if n else []
    return list(beginning) == tail
