"""Typed access to a parsed config: a value of the wrong type is an error that names the key, never a guess."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from llama_dist.errors import CheckpointError

MAX_SIZE = 2**31 - 1
MAX_LAYERS = 4096
"""Bounds what a hostile config makes us list by name; the deepest published models have some 130."""


class _Required:
    pass


REQUIRED: Any = _Required()


@dataclass(frozen=True)
class Fields:
    """The keys of one config file. `source` begins every message, e.g. "config.json".

    Each getter raises CheckpointError where the key is absent without a default, or holds another type. A default is
    given by the caller, who knows what the reference code takes; JSON null counts as absent.
    """

    source: str
    values: Mapping[str, Any]

    def _get(self, key: str, default: Any) -> Any:
        value = self.values.get(key)
        if value is not None:
            return value
        if default is REQUIRED:
            raise CheckpointError(f"{self.source}: the required key {key!r} is missing")
        return default

    def _wrong(self, key: str, value: object, kind: str) -> CheckpointError:
        return CheckpointError(f"{self.source}: {key} is {short(value)}, must be {kind}")

    def integer(self, key: str, default: Any = REQUIRED, *, low: int = 1, high: int = MAX_SIZE) -> Any:
        """An int from `low` to `high`, or `default` (returned as it is)."""
        value = self._get(key, default)
        if value is default:
            return value
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            raise self._wrong(key, value, f"an integer from {low} to {high}")
        return value

    def number(self, key: str, default: Any = REQUIRED) -> Any:
        """A finite number above zero as a float, or `default`."""
        value = self._get(key, default)
        if value is default:
            return value
        if not isinstance(value, (int, float)) or isinstance(value, bool):
            raise self._wrong(key, value, "a number")
        # The bound keeps infinity out, NaN, and integers for which float() raises.
        if not 0 < value < 2**1000:
            raise self._wrong(key, value, "a finite number above 0")
        return float(value)

    def flag(self, key: str, default: Any = REQUIRED) -> bool:
        value = self._get(key, default)
        if not isinstance(value, bool):
            raise self._wrong(key, value, "true or false")
        return value

    def text(self, key: str, default: Any = REQUIRED) -> Any:
        value = self._get(key, default)
        if value is not default and not isinstance(value, str):
            raise self._wrong(key, value, "a string")
        return value

    def table(self, key: str, default: Any = REQUIRED) -> Any:
        """A JSON object as Fields of its own, or `default`."""
        value = self._get(key, default)
        if value is default:
            return value
        if not isinstance(value, dict):
            raise self._wrong(key, value, "an object")
        return Fields(f"{self.source}: {key}", value)

    def ids(self, key: str, default: tuple[int, ...] = ()) -> tuple[int, ...]:
        """One token id or a list of them."""
        value = self._get(key, None if default is not REQUIRED else REQUIRED)
        if value is None:
            return default
        items = value if isinstance(value, list) else [value]
        if len(items) > 1024 or not all(type(i) is int and 0 <= i <= MAX_SIZE for i in items):
            raise self._wrong(key, value, "a token id or a list of them")
        return tuple(items)


def short(value: object, limit: int = 60) -> str:
    """`repr` cut to one short line, for messages about values a stranger wrote."""
    if isinstance(value, int) and value.bit_length() > 256:
        return f"an integer of {value.bit_length()} bits"
    if isinstance(value, (list, dict)) and len(value) > 8:
        return f"a {'list' if isinstance(value, list) else 'table'} of {len(value)} items"
    text = repr(value[: limit + 1] if isinstance(value, str) else value)
    return text if len(text) <= limit else text[: limit - 3] + "..."
