"""Values of JSON fields, read by type; a RequestError names the field and what it may be."""

from __future__ import annotations

import math
from typing import Any

from llama_dist.errors import RequestError


def wrong(name: str, value: Any, must: str) -> RequestError:
    """The error for a field that has a value it cannot have."""
    shown = repr(value)
    return RequestError(f"{name} is {shown if len(shown) <= 60 else shown[:57] + '...'}, must be {must}", name)


def number(name: str, value: Any) -> float:
    """A finite number; JSON's integers too."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise wrong(name, value, "a number")
    try:
        result = float(value)
    except OverflowError:
        result = math.inf
    if not math.isfinite(result):
        raise wrong(name, value, "a finite number")
    return result


def whole(name: str, value: Any, low: int | None = None, high: int | None = None) -> int:
    """A whole number from `low` to `high`, where given."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise wrong(name, value, "a whole number")
    if (low is not None and value < low) or (high is not None and value > high):
        raise wrong(name, value, f"{low} or more" if high is None else f"from {low} to {high}")
    return value


def truth(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise wrong(name, value, "true or false")
    return value


def text(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise wrong(name, value, "a text")
    return value


def texts(name: str, value: Any) -> tuple[str, ...]:
    """A list of texts."""
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise wrong(name, value, "a list of texts")
    return tuple(value)


def text_or_texts(name: str, value: Any) -> tuple[str, ...]:
    if isinstance(value, str):
        return (value,)
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise wrong(name, value, "a text or a list of texts")
    return tuple(value)


def token_ids(name: str, value: Any, vocab_size: int) -> tuple[int, ...]:
    """A list of ids below `vocab_size`."""
    if not isinstance(value, list):
        raise wrong(name, value, "a list of token ids")
    for item in value:
        if isinstance(item, bool) or not isinstance(item, int) or not 0 <= item < vocab_size:
            raise RequestError(
                f"{name} has {str(item)[:40]!r}, a token id is a whole number from 0 to {vocab_size - 1}", name
            )
    return tuple(value)


def biases(name: str, value: Any, vocab_size: int) -> tuple[tuple[int, float], ...]:
    """`{"17": -100}`: ids as JSON's keys, which are texts, and what is added to their logits; by rising id."""
    if not isinstance(value, dict):
        raise wrong(name, value, "an object of token ids and numbers")
    found: dict[int, float] = {}
    for key, bias in value.items():
        if not (key.isascii() and key.isdigit() and len(key) < 12 and int(key) < vocab_size):
            raise RequestError(f"{name} has key {key[:40]!r}, must be a token id from 0 to {vocab_size - 1}", name)
        found[int(key)] = number(f"{name}[{key!r}]", bias)
    return tuple(sorted(found.items()))
