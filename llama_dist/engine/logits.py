"""From a model's logits to those a token is drawn from: penalties, biases, bans. One row, float32, on every rank alike.

Penalties as in OpenAI's API (presence, frequency: over the answer) and CTRL (repetition: over prompt and answer, Keskar
et al. 2019). Bans come last, so that nothing lifts them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

import torch

from llama_dist.errors import RequestError
from llama_dist.kernels.told import sent
from llama_dist.request import SamplingParams

NEVER = float("-inf")


def shape(
    logits: torch.Tensor, params: SamplingParams, prompt: Sequence[int], answer: Sequence[int], stops: Iterable[int]
) -> torch.Tensor:
    """A row [vocab], as float32, with the request's penalties, biases and bans; no `stops` before `min_tokens`.

    RequestError where the bans leave no token. The device is not waited for.
    """
    row = logits.to(torch.float32, copy=True)
    if params.repetition_penalty != 1:
        ids = _ids({*prompt, *answer}, row)
        seen = row[ids]
        row[ids] = torch.where(seen > 0, seen / params.repetition_penalty, seen * params.repetition_penalty)
    if answer and (params.presence_penalty or params.frequency_penalty):
        counts = Counter(answer)
        times = sent(torch.tensor([counts[i] for i in sorted(counts)], dtype=row.dtype), row.device)
        row[_ids(counts, row)] -= params.presence_penalty + params.frequency_penalty * times
    if params.logit_bias:
        biased, by = zip(*params.logit_bias, strict=True)
        more = sent(torch.tensor(by, dtype=row.dtype), row.device)
        row.index_add_(0, sent(torch.tensor(biased), row.device), more)
    if params.allowed_token_ids is not None:
        allowed = _ids(params.allowed_token_ids, row)
        kept = row[allowed]
        row.fill_(NEVER)
        row[allowed] = kept
    banned = {word[-1] for word in params.bad_words if _ends_with(prompt, answer, word[:-1])}
    if len(answer) < params.min_tokens:
        banned |= set(stops)
    if banned:
        row.index_fill_(0, _ids(banned, row), NEVER)  # an assignment would wait for the device
    if not _left(len(row), params.allowed_token_ids, banned):
        raise RequestError("no token may be drawn: allowed_token_ids, bad_words and min_tokens leave none")
    return row


def _ids(tokens: Iterable[int], row: torch.Tensor) -> torch.Tensor:
    return sent(torch.tensor(sorted(set(tokens)), dtype=torch.int64), row.device)


def _left(vocab: int, allowed: Sequence[int] | None, banned: set[int]) -> bool:
    """Whether a token may be drawn."""
    return len(banned) < vocab if allowed is None else not banned.issuperset(allowed)


def _ends_with(prompt: Sequence[int], answer: Sequence[int], beginning: Sequence[int]) -> bool:
    """Whether the sequence so far ends with the tokens before a banned word's last one."""
    n = len(beginning)
    tail = [*prompt[-n:], *answer[-n:]][-n:] if n else []
    return list(beginning) == tail
