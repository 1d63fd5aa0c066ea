"""A tokenizer for models that have none: a text is its token ids in decimal, with blanks between."""

from __future__ import annotations

from llama_dist.errors import RequestError
from llama_dist.text.tokenizer import PieceTokenizer


def ids_tokenizer(n_words: int) -> PieceTokenizer:
    """`"17 4"` is the ids 17 and 4; no id is special."""

    def encode(text: str) -> list[int]:
        words = text.split()
        wrong = next((word for word in words if not (word.isascii() and word.isdigit() and int(word) < n_words)), None)
        if wrong is not None:
            raise RequestError(f"{wrong[:40]!r} is no token id, must be from 0 to {n_words - 1}")
        return [int(word) for word in words]

    pieces = [f"{i} ".encode() for i in range(n_words)]
    return PieceTokenizer("ids", n_words, None, None, 0, frozenset(), {}, False, None, encode, pieces)
