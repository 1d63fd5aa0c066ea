"""The body of a request, under the names of OpenAI's API and vLLM's additions to it, as sampling parameters.

Defaults are OpenAI's: temperature 1, top_p 1, 16 tokens for a completion, and for a chat answer as many as there is
room for. A field that is null counts as absent, as there; a name that is not known is refused, never passed over.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from llama_dist.errors import RequestError
from llama_dist.frontend.batch import values
from llama_dist.frontend.batch.values import wrong
from llama_dist.request import SamplingParams
from llama_dist.text.base import Tokenizer

COMPLETION_TOKENS = 16
MOST_TOP_LOGPROBS = 20
MOST_ANSWERS = 128

IGNORED = frozenset({"user", "metadata"})
BOTH = frozenset(
    {
        "model", "stream", "temperature", "top_p", "top_k", "min_p", "max_tokens", "min_tokens", "presence_penalty",
        "frequency_penalty", "repetition_penalty", "logit_bias", "seed", "stop", "stop_token_ids", "ignore_eos", "n",
        "logprobs", "prompt_logprobs", "allowed_token_ids", "bad_words", "return_token_ids",
    }
)  # fmt: skip
COMPLETION_FIELDS = BOTH | IGNORED | {"prompt", "echo", "best_of", "add_special_tokens"}
CHAT_FIELDS = BOTH | IGNORED | {"messages", "max_completion_tokens", "top_logprobs"}

_Reader = Callable[[str, Any, int], Any]
_SAME_NAME: Mapping[str, _Reader] = {
    **dict.fromkeys(
        ("temperature", "top_p", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty"),
        lambda name, value, vocab: values.number(name, value),
    ),
    "min_tokens": lambda name, value, vocab: values.whole(name, value),
    "seed": lambda name, value, vocab: values.whole(name, value),
    "ignore_eos": lambda name, value, vocab: values.truth(name, value),
    "echo": lambda name, value, vocab: values.truth(name, value),
    "stop": lambda name, value, vocab: values.text_or_texts(name, value),
    "stop_token_ids": values.token_ids,
    "allowed_token_ids": values.token_ids,
    "logit_bias": values.biases,
}
"""Fields that are sampling parameters as they stand, and how each is read: name, value and vocabulary size."""


@dataclass(frozen=True)
class Settings:
    """What a body asks for beside its prompt. `n` answers are sampled, each with its own seed."""

    params: SamplingParams
    n: int = 1
    model: str | None = None
    return_token_ids: bool = False
    add_special_tokens: bool = True


def read_settings(body: Mapping[str, Any], chat: bool, tokenizer: Tokenizer, vocab_size: int) -> Settings:
    """The settings of a chat's or a completion's body. RequestError naming the first field that cannot be served."""
    known = CHAT_FIELDS if chat else COMPLETION_FIELDS
    for name in body:
        if name not in known:
            raise _unknown(name, known, chat)
    given = {name: value for name, value in body.items() if value is not None}
    if values.truth("stream", given.get("stream", False)):
        raise wrong("stream", True, "false: results go to the output file")
    asked: dict[str, Any] = {"temperature": 1.0, "top_p": 1.0}
    for name, read in _SAME_NAME.items():
        if name in given:
            asked[name] = read(name, given[name], vocab_size)
    if "top_k" in given:  # -1 is vLLM's way to say that all stay
        asked["top_k"] = max(0, values.whole("top_k", given["top_k"], -1))
    asked["max_tokens"] = _max_tokens(given, chat)
    asked |= _logprobs(given, chat)
    if "bad_words" in given:
        asked["bad_words"] = bad_words(values.texts("bad_words", given["bad_words"]), tokenizer)
    n = values.whole("n", given.get("n", 1), 1, MOST_ANSWERS)
    if values.whole("best_of", given.get("best_of", n)) != n:
        raise wrong("best_of", given["best_of"], f"as large as n, {n}: every answer sampled is reported")
    return Settings(
        SamplingParams(**asked),
        n,
        values.text("model", given["model"]) if "model" in given else None,
        values.truth("return_token_ids", given.get("return_token_ids", False)),
        values.truth("add_special_tokens", given.get("add_special_tokens", True)),
    )


def _unknown(name: str, known: frozenset[str], chat: bool) -> RequestError:
    kind = "chat" if chat else "completion"
    other = COMPLETION_FIELDS if chat else CHAT_FIELDS
    if name in other:
        return RequestError(f"{name} is no field of a {kind} request", name)
    close = difflib.get_close_matches(name, sorted(known), n=1, cutoff=0.7)
    hint = f"; did you mean {close[0]}?" if close else ""
    return RequestError(f"{name[:60]!r} is no known field of a {kind} request{hint}", name)


def _max_tokens(given: Mapping[str, Any], chat: bool) -> int | None:
    names = [name for name in ("max_completion_tokens", "max_tokens") if name in given]
    if not names:
        return None if chat else COMPLETION_TOKENS
    limits = [values.whole(name, given[name], 0) for name in names]
    if len(set(limits)) > 1:
        raise wrong("max_tokens", limits[1], f"the same as max_completion_tokens, {limits[0]}; give one of them")
    return limits[0]


def _logprobs(given: Mapping[str, Any], chat: bool) -> dict[str, Any]:
    """A completion says `logprobs: 5`; a chat `logprobs: true` and `top_logprobs: 5`."""
    asked: dict[str, Any] = {}
    if chat:
        asked["logprobs"] = values.truth("logprobs", given.get("logprobs", False))
        top = values.whole("top_logprobs", given.get("top_logprobs", 0), 0, MOST_TOP_LOGPROBS)
        if top and not asked["logprobs"]:
            raise wrong("top_logprobs", top, "0 unless logprobs is true")
        asked["top_logprobs"] = top
    elif "logprobs" in given:
        asked["logprobs"] = True
        asked["top_logprobs"] = values.whole("logprobs", given["logprobs"], 0, MOST_TOP_LOGPROBS)
    scores = given.get("prompt_logprobs", False)
    if not isinstance(scores, bool) and (not isinstance(scores, int) or scores != 0):
        raise wrong("prompt_logprobs", scores, "true, false or 0: alternatives to the prompt's tokens are not scored")
    asked["prompt_logprobs"] = scores is not False
    return asked


def bad_words(words: tuple[str, ...], tokenizer: Tokenizer) -> tuple[tuple[int, ...], ...]:
    """The token sequences of each word, at a text's beginning and behind a space.

    As in vLLM, the second counts only where the space merges into the word's first token.
    """
    found: list[tuple[int, ...]] = []
    for word in words:
        if not word.strip():
            raise wrong("bad_words", word, "texts with more than blanks in them")
        plain = tuple(tokenizer.encode(word.lstrip(), bos=False, eos=False))
        spaced = tuple(tokenizer.encode(" " + word.lstrip(), bos=False, eos=False))
        found.append(plain)
        if len(spaced) == len(plain) and spaced[0] != plain[0]:
            found.append(spaced)
    return tuple(dict.fromkeys(found))
