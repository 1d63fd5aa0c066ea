"""The one tokenizer class: an encoder of plain text and a table of bytes, filled by one function a file format."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

END_OF_TURN = ("<|eot_id|>", "<|eom_id|>", "<|im_end|>", "<|end_of_text|>", "<|endoftext|>")
"""Control tokens that end an answer in every vocabulary that has them."""

_SURROGATES = re.compile("[\ud800-\udfff]")
_SPACE_MARK = "\u2581"


@dataclass(eq=False)
class PieceTokenizer:
    """A `Tokenizer` whose ids stand for bytes.

    `encode_text` turns plain text into ids and knows no control token, so nothing in a text can become one.
    `pieces[i]` are the bytes id `i` stands for: empty for control tokens, which are left out of decoded text.
    `spaced`: ids that lose their leading space where a text begins with them (sentencepiece's dummy prefix).
    `each_byte`: undecodable bytes become one U+FFFD each (sentencepiece), else one a sequence (Unicode, ch. 3.9).
    `encode_run`: how text behind a control token is encoded, where that differs from text at the very beginning.
    `strip_left`, `strip_right`: control tokens of a chat template that swallow the white space before or after them.
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
    encode_text: Callable[[str], list[int]]
    pieces: Sequence[bytes]
    spaced: frozenset[int] = frozenset()
    each_byte: bool = False
    encode_run: Callable[[str], list[int]] | None = None
    strip_left: frozenset[str] = frozenset()
    strip_right: frozenset[str] = frozenset()

    def encode(self, s: str, *, bos: bool, eos: bool) -> list[int]:
        """Plain text to ids. Lone surrogates, which no encoding has bytes for, become U+FFFD first."""
        ids = self.encode_text(whole_characters(s)) if s else []
        if bos and self.bos_id is not None:
            ids.insert(0, self.bos_id)
        if eos and self.eos_id is not None:
            ids.append(self.eos_id)
        return ids

    def decode(self, ids: list[int]) -> str:
        """Ids to text. Control tokens and ids outside the vocabulary are left out."""
        parts: list[bytes] = []
        for i in ids:
            piece = self.piece(i, first=not parts)
            if piece is not None:
                parts.append(piece)
        return replaced(b"".join(parts).decode("utf-8", self.errors))

    def piece(self, i: int, first: bool) -> bytes | None:
        """The bytes of id `i`, None if it shows nothing; `first`: nothing was shown before it."""
        piece = self.pieces[i] if 0 <= i < len(self.pieces) else b""
        if not piece:
            return None
        return piece[1:] if first and i in self.spaced else piece

    @property
    def errors(self) -> str:
        """The error handler for `bytes.decode`; `replaced` must follow."""
        return "surrogateescape" if self.each_byte else "replace"

    def text_of(self, i: int | None) -> str:
        """The text of control token `i`, empty if it is none."""
        return next((text for text, known in self.special.items() if known == i), "")


def replaced(text: str) -> str:
    """U+FFFD for each byte that `surrogateescape` let through."""
    return _SURROGATES.sub("\ufffd", text)


def whole_characters(s: str) -> str:
    """`s` with surrogate pairs joined and lone surrogates replaced by U+FFFD."""
    if not _SURROGATES.search(s):
        return s
    return s.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def is_tag(text: str) -> bool:
    """Whether an added token marks structure (`<think>`, `[REF]`) rather than being a word or a run of blanks."""
    plain = text.replace(_SPACE_MARK, " ").strip()
    return bool(plain) and not plain.isalnum()


def stop_ids(special: Mapping[str, int], *more: int | None) -> frozenset[int]:
    """The ids that end an answer: known end-of-turn tokens and `more`."""
    known = [special[text] for text in END_OF_TURN if text in special]
    return frozenset(known + [i for i in more if i is not None and i >= 0])


def spaced_piece(text: str) -> bytes:
    """The bytes of a sentencepiece-style piece: U+2581 stands for a space."""
    return text.replace(_SPACE_MARK, " ").encode("utf-8", "replace")


def byte_of(text: str) -> bytes | None:
    """The byte that a piece such as `<0x0A>` stands for, None for other pieces."""
    if len(text) == 6 and text.startswith("<0x") and text.endswith(">"):
        try:
            return bytes([int(text[3:5], 16)])
        except ValueError:
            return None
    return None
