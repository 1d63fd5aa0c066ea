"""What every tokenizer offers, whatever file it was read from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol


class Tokenizer(Protocol):
    """Text to token ids and back.

    `kind`: sentencepiece, tiktoken, tokenizer.json, gguf or ids. `n_words`: size of the vocabulary.
    `special`: control tokens by their text. `stop_ids`: ids that end an answer.
    `add_bos`: whether completions of plain text begin with `bos_id`.
    `chat_template`: the checkpoint's own Jinja template, where its tokenizer files carry one.
    """

    kind: str
    n_words: int
    bos_id: int | None
    eos_id: int | None
    pad_id: int
    stop_ids: frozenset[int]
    special: Mapping[str, int]
    add_bos: bool
    chat_template: str | None

    def encode(self, s: str, *, bos: bool, eos: bool) -> list[int]:
        """Plain text to ids: nothing in `s` ever becomes a control token. `bos` and `eos` add those ids."""
        ...

    def decode(self, ids: list[int]) -> str:
        """Ids to text; control tokens are left out, bytes that are no UTF-8 become U+FFFD."""
        ...
