"""Result records: one line of JSON a request, in the shape of OpenAI's batch output.

Nothing in a record depends on when or beside what it was computed, so a job that was killed and resumed writes the
same bytes as one that was not: ids come from the job and the line, and `created` is the line's number and no time. Only
where it is asked for does usage tell prefix cache hits, which depend on what ran before.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from llama_dist.frontend.batch.lines import Line
from llama_dist.frontend.batch.token_text import LOWEST, TokenTexts, shown_logprob
from llama_dist.request import Completion, TopLogprobs
from llama_dist.text.base import Tokenizer

__all__ = ["LOWEST", "Names", "count_new", "failure", "success"]


@dataclass(frozen=True)
class Names:
    """What a job's records are called by: 16 hex digits of the job, and the model where a request names none.

    `cached_tokens`: usage counts the prompt tokens that the prefix cache had. `system_fingerprint`: a reproducible
    job's.
    """

    job: str
    model: str
    cached_tokens: bool = False
    system_fingerprint: str | None = None


def _encode(record: dict[str, Any]) -> bytes:
    # ASCII only: no reader of lines takes U+2028 or U+0085 inside a text for the end of one.
    return json.dumps(record, separators=(",", ":")).encode("ascii") + b"\n"


def failure(names: Names, number: int, custom_id: str, code: str, message: str) -> bytes:
    """The record of a line that has no answer; the message begins with the line's number."""
    error = {"code": code, "message": f"line {number}: {message}"}
    return _encode({"id": f"batch_req_{names.job}_{number}", "custom_id": custom_id, "response": None, "error": error})


def count_new(line: Line, completions: Sequence[Completion]) -> int:
    """Generated tokens of all answers."""
    return sum(len(_generated(line, completion)) for completion in completions)


def success(names: Names, line: Line, completions: Sequence[Completion], tokenizer: Tokenizer) -> bytes:
    """The record of an answered line; `completions` in the order of its answers."""
    texts = TokenTexts(tokenizer)
    make = _chat_choice if line.chat else _completion_choice
    choices = []
    for index, completion in enumerate(completions):
        choice = {"index": index, **make(line, completion, texts), "finish_reason": completion.finish_reason}
        if completion.prompt_logprobs is not None:
            choice["prompt_logprobs"] = _prompt_logprobs(line, completion.prompt_logprobs, texts)
        if line.settings.return_token_ids:
            choice["token_ids"] = _generated(line, completion)
            choice["prompt_token_ids"] = line.prompt
        choices.append(choice)
    new = count_new(line, completions)
    usage: dict[str, Any] = {
        "prompt_tokens": len(line.prompt),
        "completion_tokens": new,
        "total_tokens": len(line.prompt) + new,
    }
    if names.cached_tokens:  # the first answer's: the others find what that one computed
        usage["prompt_tokens_details"] = {"cached_tokens": completions[0].cached_tokens}
    body = {
        "id": f"{'chatcmpl' if line.chat else 'cmpl'}-{names.job}-{line.number}",
        "object": "chat.completion" if line.chat else "text_completion",
        "created": line.number,
        "model": line.settings.model or names.model,
        "choices": choices,
        "usage": usage,
    }
    if names.system_fingerprint is not None:
        body["system_fingerprint"] = names.system_fingerprint
    response = {"status_code": 200, "request_id": f"req_{names.job}_{line.number}", "body": body}
    return _encode(
        {
            "id": f"batch_req_{names.job}_{line.number}",
            "custom_id": line.custom_id,
            "response": response,
            "error": None,
        }
    )


def _generated(line: Line, completion: Completion) -> tuple[int, ...]:
    return completion.token_ids[len(line.prompt) :] if line.settings.params.echo else completion.token_ids


def _text(line: Line, completion: Completion, texts: TokenTexts) -> str:
    """The answer up to a stop string; with echo, the prompt before it."""
    text = texts.tokenizer.decode(list(_generated(line, completion)))
    cut = 0 if completion.text_len is None else len(text) - completion.text_len
    if line.settings.params.echo:
        text = texts.tokenizer.decode(list(completion.token_ids))
    return text[: len(text) - cut]


def _completion_choice(line: Line, completion: Completion, texts: TokenTexts) -> dict[str, Any]:
    logprobs = None
    if completion.logprobs is not None:
        scores: list[float | None] = [shown_logprob(x) for x in completion.logprobs]
        tops: list[dict[str, float] | None] | None = None
        if completion.top_logprobs is not None:
            tops = [
                _by_text(i, x, top, texts)
                for i, x, top in zip(completion.token_ids, completion.logprobs, completion.top_logprobs, strict=True)
            ]
        if line.settings.params.echo and scores:  # nothing comes before the first token to score it by
            scores[0] = None
            if tops:
                tops[0] = None
        logprobs = {
            "tokens": [texts.of(i) for i in completion.token_ids],
            "token_logprobs": scores,
            "top_logprobs": tops,
            "text_offset": texts.offsets(completion.token_ids),
        }
    return {"text": _text(line, completion, texts), "logprobs": logprobs}


def _by_text(token: int, logprob: float, top: TopLogprobs, texts: TokenTexts) -> dict[str, float]:
    """The likeliest tokens, and the one that stands there where it is none of them."""
    found: dict[str, float] = {}
    for i, x in [*top, (token, logprob)]:
        found.setdefault(texts.of(i), shown_logprob(x))
    return found


def _chat_choice(line: Line, completion: Completion, texts: TokenTexts) -> dict[str, Any]:
    logprobs = None
    if completion.logprobs is not None:
        tops: Sequence[TopLogprobs] = completion.top_logprobs or [()] * len(completion.token_ids)
        logprobs = {
            "content": [
                {**_scored(i, x, texts), "top_logprobs": [_scored(j, y, texts) for j, y in top]}
                for i, x, top in zip(completion.token_ids, completion.logprobs, tops, strict=True)
            ],
            "refusal": None,
        }
    message = {"role": "assistant", "content": _text(line, completion, texts), "refusal": None}
    return {"message": message, "logprobs": logprobs}


def _scored(token: int, logprob: float, texts: TokenTexts) -> dict[str, Any]:
    return {"token": texts.of(token), "logprob": shown_logprob(logprob), "bytes": list(texts.bytes_of(token))}


def _prompt_logprobs(line: Line, scores: Sequence[float], texts: TokenTexts) -> list[dict[str, Any] | None]:
    """vLLM's shape: for each prompt token but the first, its id to its logprob and text."""
    scored: list[dict[str, Any] | None] = [
        {str(i): {"logprob": shown_logprob(x), "decoded_token": texts.of(i)}}
        for i, x in zip(line.prompt, scores, strict=True)
    ]
    scored[:1] = [None]
    return scored
