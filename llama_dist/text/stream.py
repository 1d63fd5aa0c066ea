"""Text as it is generated: each new id adds what has become readable."""

from __future__ import annotations

import codecs

from llama_dist.text.base import Tokenizer
from llama_dist.text.tokenizer import PieceTokenizer, replaced


class TextStream:
    """The text of a growing list of ids; what `push` and `finish` return adds up to `tokenizer.decode` of the list.

    State is at most one unfinished UTF-8 sequence, so an id costs the same however long the text is. Example: an
    emoji of four one-byte ids returns '', '', '' and the emoji.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        assert isinstance(tokenizer, PieceTokenizer), "every tokenizer of load_tokenizer and tokenizer_from_gguf is one"
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")(tokenizer.errors)
        self._first = True

    def push(self, token_id: int) -> str:
        """The text that `token_id` completes, '' while a character is incomplete."""
        piece = self._tokenizer.piece(token_id, self._first)
        if piece is None:
            return ""
        self._first = False
        return replaced(self._decoder.decode(piece))

    def finish(self) -> str:
        """What an unfinished character at the end reads as: U+FFFD, or '' where nothing is left."""
        return replaced(self._decoder.decode(b"", final=True))
