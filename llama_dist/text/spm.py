"""sentencepiece vocabularies: tokenizer.model of Llama 1, Llama 2 and Mistral, and the same pieces out of a GGUF."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from llama_dist.errors import CheckpointError
from llama_dist.text.sidecar import Sidecar
from llama_dist.text.spm_proto import (
    BYTE,
    CONTROL,
    UNKNOWN,
    USER_DEFINED,
    SpmModel,
    read_model,
    replace_pieces,
)
from llama_dist.text.tokenizer import PieceTokenizer, byte_of, is_tag, spaced_piece, stop_ids


@dataclass(frozen=True)
class Vocabulary:
    """What a sentencepiece model gives a `PieceTokenizer`."""

    encode_text: Callable[[str], list[int]]
    pieces: list[bytes]
    special: dict[str, int]
    spaced: frozenset[int]
    bos_id: int | None
    eos_id: int | None
    pad_id: int


def load_sentencepiece(data: bytes, where: str, sidecar: Sidecar) -> PieceTokenizer:
    """The tokenizer in the bytes of a .model file; `where` names it in errors. CheckpointError if it is damaged.

    Encodes and decodes as Meta's `Tokenizer` of Llama 2 does: the text gets a space in front, which decoding takes
    away, and `pad_id` is -1 where the model has none. Lossless but for U+2581, which sentencepiece reads as a space.
    """
    vocabulary = open_model(data, read_model(data, where), where)
    return PieceTokenizer(
        kind="sentencepiece",
        n_words=len(vocabulary.pieces),
        bos_id=vocabulary.bos_id,
        eos_id=vocabulary.eos_id,
        pad_id=vocabulary.pad_id,
        stop_ids=stop_ids(vocabulary.special, vocabulary.eos_id, *sidecar.eos_ids),
        special=vocabulary.special,
        add_bos=vocabulary.bos_id is not None and sidecar.add_bos is not False,
        chat_template=sidecar.chat_template,
        encode_text=vocabulary.encode_text,
        pieces=vocabulary.pieces,
        spaced=vocabulary.spaced,
        each_byte=True,
    )


def open_model(data: bytes, model: SpmModel, where: str) -> Vocabulary:
    """Opens a ModelProto, read as `model`. Pieces such as `[REF]` that plain text would turn into are made control."""
    import sentencepiece

    tags = {i for i, piece in enumerate(model.pieces) if piece.type == USER_DEFINED and is_tag(piece.text)}
    if tags:
        data = replace_pieces(data, [p._replace(type=CONTROL) if i in tags else p for i, p in enumerate(model.pieces)])
    try:
        processor = sentencepiece.SentencePieceProcessor(model_proto=data)
    except (RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())[-100:]
        raise CheckpointError(f"{where}: sentencepiece refuses the model ({reason}); fetch the file again") from None
    pieces = [_bytes_of(model, i) for i in range(len(model.pieces))]
    takes_prefix = model.dummy_prefix or model.remove_extra_space
    spaced = (
        i
        for i, p in enumerate(model.pieces)
        if pieces[i][:1] == b" " and p.type not in (BYTE, UNKNOWN) and takes_prefix
    )

    def encode(s: str) -> list[int]:
        ids: list[int] = processor.encode(s)
        return ids

    bos, eos = processor.bos_id(), processor.eos_id()
    return Vocabulary(
        encode_text=encode,
        pieces=pieces,
        special={p.text: i for i, p in enumerate(model.pieces) if p.type == CONTROL or i in tags},
        spaced=frozenset(spaced),
        bos_id=bos if bos >= 0 else None,
        eos_id=eos if eos >= 0 else None,
        pad_id=processor.pad_id(),
    )


def _bytes_of(model: SpmModel, i: int) -> bytes:
    text, _, kind = model.pieces[i]
    if kind == CONTROL:
        return b""
    if kind == UNKNOWN:
        return model.unk_surface.encode()
    return (byte_of(text) if kind == BYTE else None) or spaced_piece(text)
