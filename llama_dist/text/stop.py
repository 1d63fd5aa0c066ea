"""Finding a stop string in an answer as it grows, also across the borders of tokens."""

from __future__ import annotations

from collections.abc import Sequence

from llama_dist.text.base import Tokenizer
from llama_dist.text.stream import TextStream


class StopMatcher:
    """Fed an answer's tokens one by one, says where the first stop string begins.

    Example: stop "</a>", tokens "x<", "/a", ">y": the third `push` returns 1, the characters before the stop string.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str]) -> None:
        self._stream, self._stop = TextStream(tokenizer), tuple(stop)
        self._keep = max(len(s) for s in stop) - 1
        self._tail = ""  # the newest characters, which may be the beginning of a stop string
        self._before = 0  # characters that came before them

    def push(self, token: int, armed: bool = True) -> int | None:
        """The length the answer's text is cut to, once a stop string is complete. Not `armed`: only keep reading."""
        self._tail += self._stream.push(token)
        found = [at for s in self._stop if (at := self._tail.find(s)) >= 0] if armed else []
        if found:
            return self._before + min(found)
        cut = max(0, len(self._tail) - self._keep)
        self._before, self._tail = self._before + cut, self._tail[cut:]
        return None
