"""Single tokens as text, for lists of logprobs."""

from __future__ import annotations

import math
from collections.abc import Sequence

from llama_dist.text.base import Tokenizer
from llama_dist.text.stream import TextStream
from llama_dist.text.tokenizer import PieceTokenizer

LOWEST = -9999.0
"""Stands for minus infinity, which JSON has no word for; OpenAI's number for it."""


def shown_logprob(logprob: float) -> float:
    return logprob if math.isfinite(logprob) and logprob > LOWEST else LOWEST


class TokenTexts:
    """Each token by itself, with the space it may begin with. Control tokens show their names."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        assert isinstance(tokenizer, PieceTokenizer), "every tokenizer of load_tokenizer and tokenizer_from_gguf is one"
        self.tokenizer = tokenizer

    def bytes_of(self, token: int) -> bytes:
        return self.tokenizer.piece(token, first=False) or self.tokenizer.text_of(token).encode("utf-8", "replace")

    def of(self, token: int) -> str:
        """The token's text; `bytes:\\xe2\\x80` where its bytes are a part of a character only, as OpenAI has it."""
        data = self.bytes_of(token)
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)

    def offsets(self, tokens: Sequence[int]) -> list[int]:
        """Characters of the decoded text that come before each token."""
        stream = TextStream(self.tokenizer)
        offsets, length = [], 0
        for token in tokens:
            offsets.append(length)
            length += len(stream.push(token))
        return offsets
