"""sentencepiece's ModelProto, read and written field by field (google/sentencepiece, sentencepiece_model.proto).

Only what decides an encoding is read. The format is protocol buffers': a key (field number << 3 | wire type), then a
varint (type 0), eight bytes (1), a length and that many bytes (2), or four bytes (5).
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from llama_dist.errors import CheckpointError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
_PIECES, _TRAINER, _NORMALIZER = 1, 2, 3
_MODEL_TYPE, _BYTE_FALLBACK, _UNK_ID, _BOS_ID, _EOS_ID, _PAD_ID, _UNK_SURFACE = 3, 35, 40, 41, 42, 43, 44
_UNK_PIECE, _BOS_PIECE, _EOS_PIECE, _PAD_PIECE = 45, 46, 47, 48
_BPE = 2
_NAME, _DUMMY_PREFIX, _REMOVE_EXTRA_SPACE, _ESCAPE_SPACE = 1, 3, 4, 5


class Piece(NamedTuple):
    """One vocabulary entry; `type` is one of the constants above (GGUF's token types are the same numbers)."""

    text: str
    score: float
    type: int


@dataclass(frozen=True)
class SpmModel:
    """A ModelProto: its pieces in the order of their ids and the settings that decoding needs.

    The ids of <s>, </s> and <pad>, -1 for none, are written but not read: the library finds them by their texts.
    """

    pieces: list[Piece]
    dummy_prefix: bool = True
    remove_extra_space: bool = True
    unk_surface: str = " \u2047 "
    bos_id: int = -1
    eos_id: int = -1
    pad_id: int = -1


def read_model(data: bytes, where: str) -> SpmModel:
    """CheckpointError, naming `where`, if `data` is no ModelProto with at least one piece."""
    pieces: list[Piece] = []
    trainer: dict[int, int | bytes] = {}
    normalizer: dict[int, int | bytes] = {}
    try:
        for number, value, _ in _fields(data):
            if number == _PIECES:
                pieces.append(_piece(value))
            elif number in (_TRAINER, _NORMALIZER) and isinstance(value, bytes):
                (trainer if number == _TRAINER else normalizer).update((n, v) for n, v, _ in _fields(value))
    except (ValueError, IndexError, struct.error):
        raise CheckpointError(f"{where} is neither a sentencepiece model, tiktoken ranks nor tokenizer.json") from None
    if not pieces:
        raise CheckpointError(f"{where} is a sentencepiece model without pieces; fetch the file again")
    surface = trainer.get(_UNK_SURFACE)
    return SpmModel(
        pieces,
        dummy_prefix=bool(normalizer.get(_DUMMY_PREFIX, 1)),
        remove_extra_space=bool(normalizer.get(_REMOVE_EXTRA_SPACE, 1)),
        unk_surface=surface.decode("utf-8", "replace") if isinstance(surface, bytes) else " \u2047 ",
    )


def replace_pieces(data: bytes, pieces: Iterable[Piece]) -> bytes:
    """The model in `data` with other pieces."""
    rest = b"".join(raw for number, _, raw in _fields(data) if number != _PIECES)
    return _write_pieces(pieces) + rest


def write_model(model: SpmModel) -> bytes:
    """A BPE model with no normalisation, as Llama's; bytes stand in for unknown characters where there are byte pieces.

    The pieces must hold one of type UNKNOWN.
    """
    fallback = any(piece.type == BYTE for piece in model.pieces)
    trainer = _number(_MODEL_TYPE, _BPE) + _number(_BYTE_FALLBACK, fallback)
    unknown = next(i for i, piece in enumerate(model.pieces) if piece.type == UNKNOWN)
    named = ((_UNK_ID, _UNK_PIECE, unknown), (_BOS_ID, _BOS_PIECE, model.bos_id), (_EOS_ID, _EOS_PIECE, model.eos_id))
    for field, text_field, at in (*named, (_PAD_ID, _PAD_PIECE, model.pad_id)):
        # A role that no piece has is given to the unknown one, which the library takes for none; "" would be <s>.
        text = model.pieces[at if at >= 0 else unknown].text
        trainer += _number(field, at % (1 << 64)) + _bytes(text_field, text.encode())
    normalizer = _bytes(_NAME, b"identity") + _number(_DUMMY_PREFIX, model.dummy_prefix)
    normalizer += _number(_REMOVE_EXTRA_SPACE, model.remove_extra_space) + _number(_ESCAPE_SPACE, 1)
    return _write_pieces(model.pieces) + _bytes(_TRAINER, trainer) + _bytes(_NORMALIZER, normalizer)


def _piece(value: int | bytes) -> Piece:
    if not isinstance(value, bytes):
        raise ValueError
    fields = {number: v for number, v, _ in _fields(value)}
    text, score, kind = fields.get(1, b""), fields.get(2, b"\0\0\0\0"), fields.get(3, NORMAL)
    if not isinstance(text, bytes) or not isinstance(score, bytes) or not isinstance(kind, int):
        raise ValueError
    return Piece(text.decode("utf-8"), struct.unpack("<f", score)[0], kind)


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes, bytes]]:
    """(field number, value, the field as it was written) of each field of a message."""
    at = 0
    value: int | bytes
    while at < len(data):
        begin = at
        key, at = _varint(data, at)
        wire = key & 7
        if wire == 0:
            value, at = _varint(data, at)
        else:
            if wire == 2:
                size, at = _varint(data, at)
            else:
                size = {1: 8, 5: 4}.get(wire, -1)
            if size < 0 or at + size > len(data):
                raise ValueError
            value = data[at : at + size]
            at += size
        yield key >> 3, value, data[begin:at]


def _varint(data: bytes, at: int) -> tuple[int, int]:
    result = shift = 0
    while True:
        byte = data[at]
        at += 1
        result |= (byte & 0x7F) << shift
        if byte < 0x80:
            return result, at
        shift += 7
        if shift > 63:
            raise ValueError


def _write_pieces(pieces: Iterable[Piece]) -> bytes:
    out = bytearray()
    for text, score, kind in pieces:
        body = _bytes(1, text.encode("utf-8")) + b"\x15" + struct.pack("<f", score) + _number(3, kind)
        out += _bytes(_PIECES, body)
    return bytes(out)


def _bytes(number: int, value: bytes) -> bytes:
    return _write_varint(number << 3 | 2) + _write_varint(len(value)) + value


def _number(number: int, value: int) -> bytes:
    return _write_varint(number << 3) + _write_varint(value)


def _write_varint(value: int) -> bytes:
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)
