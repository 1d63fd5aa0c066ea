"""GPT-2's byte-level alphabet: every byte has a printable character, so that vocabularies can be written as text."""

from __future__ import annotations

from collections.abc import Iterable

# The printable bytes stand for themselves; the others, in order, for U+0100 and on (Radford et al. 2019, encoder.py).
_PRINTABLE = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
_OTHERS = [b for b in range(256) if b not in set(_PRINTABLE)]
_NO_BYTE = 0xFFFF
_TO_BYTE = {
    **dict.fromkeys(_OTHERS, _NO_BYTE),
    **{b: b for b in _PRINTABLE},
    **{0x100 + n: b for n, b in enumerate(_OTHERS)},
}


def byte_level_pieces(texts: Iterable[str]) -> list[bytes]:
    """The bytes each vocabulary entry stands for; an entry with a foreign character stands for itself in UTF-8."""
    pieces = []
    for text in texts:
        try:
            pieces.append(text.translate(_TO_BYTE).encode("latin-1"))
        except UnicodeEncodeError:
            pieces.append(text.encode("utf-8", "replace"))
    return pieces
