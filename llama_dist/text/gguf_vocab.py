"""The tokenizer in a GGUF's metadata (ggml-org/ggml, docs/gguf.md): `gpt2` is byte-level BPE, `llama` sentencepiece."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from llama_dist.errors import CheckpointError
from llama_dist.text.byte_level import byte_level_pieces
from llama_dist.text.pretokenizers import PRE_TOKENIZERS, PreTokenizer
from llama_dist.text.spm import open_model
from llama_dist.text.spm_proto import BYTE, CONTROL, NORMAL, UNKNOWN, UNUSED, USER_DEFINED, Piece, SpmModel, write_model
from llama_dist.text.tokenizer import PieceTokenizer, is_tag, stop_ids

_T = TypeVar("_T")
_WHERE = "GGUF metadata"


@dataclass(frozen=True)
class BytePairs:
    """A `gpt2` vocabulary: control tokens, what plain text can become, its merges in order, and how text is cut.

    `words` are the added tokens among the `usable` ones: they are matched whole, before anything is cut.
    """

    tokens: list[str]
    types: list[int]
    special: dict[str, int]
    usable: dict[str, int]
    words: list[str]
    merges: list[tuple[str, str]]
    pre: PreTokenizer


def tokenizer_from_gguf(metadata: Mapping[str, Any]) -> PieceTokenizer:
    """The tokenizer that `tokenizer.ggml.*` describe; values are plain numbers, strings, booleans and lists.

    CheckpointError if a key is missing, of the wrong type or length, or names a kind or a pre-tokenizer that is not
    supported.
    """
    vocabulary = read_vocabulary(metadata)
    if isinstance(vocabulary, BytePairs):
        return _byte_level(metadata, vocabulary)
    return _sentencepiece(metadata, vocabulary)


def read_vocabulary(metadata: Mapping[str, Any]) -> BytePairs | SpmModel:
    """The vocabulary that `tokenizer.ggml.*` describe, as its kind has it. CheckpointError as above."""
    model = _get(metadata, "tokenizer.ggml.model", str)
    tokens = _texts(metadata, "tokenizer.ggml.tokens")
    types = _types(metadata, tokens)
    if model == "gpt2":
        return _byte_pairs(metadata, tokens, types)
    if model == "llama":
        return _spm_model(metadata, tokens, types)
    raise CheckpointError(f"{_WHERE}: tokenizer.ggml.model is {model!r}, only 'gpt2' and 'llama' are supported")


def _byte_pairs(metadata: Mapping[str, Any], tokens: list[str], types: list[int]) -> BytePairs:
    name = _get(metadata, "tokenizer.ggml.pre", str) if "tokenizer.ggml.pre" in metadata else "default"
    if name not in PRE_TOKENIZERS:
        known = ", ".join(sorted(PRE_TOKENIZERS))
        raise CheckpointError(f"{_WHERE}: tokenizer.ggml.pre is {name!r}, known are {known}")
    special = _special(tokens, types)
    usable = {
        text: i
        for i, (text, kind) in enumerate(zip(tokens, types, strict=True))
        if kind in (NORMAL, USER_DEFINED) and text not in special
    }
    words = [text for text, kind in zip(tokens, types, strict=True) if kind == USER_DEFINED and text in usable]
    return BytePairs(tokens, types, special, usable, words, _merges(metadata, usable), PRE_TOKENIZERS[name])


def _byte_level(metadata: Mapping[str, Any], vocabulary: BytePairs) -> PieceTokenizer:
    tokens, types = vocabulary.tokens, vocabulary.types
    pieces = byte_level_pieces(tokens)
    for i, (text, kind) in enumerate(zip(tokens, types, strict=True)):
        if kind == USER_DEFINED:
            pieces[i] = text.encode("utf-8", "replace")
        elif kind != NORMAL:
            pieces[i] = b""
    return _finish(metadata, tokens, vocabulary.special, _bpe(vocabulary), pieces, vocabulary.pre.add_bos)


def _bpe(vocabulary: BytePairs) -> Callable[[str], list[int]]:
    """A byte-level BPE encoder. No control token is among the `usable` ones, so none can come out."""
    import tokenizers
    from tokenizers import models, normalizers, pre_tokenizers

    pre = vocabulary.pre
    try:
        model = models.BPE(vocabulary.usable, vocabulary.merges, ignore_merges=pre.whole_words)
        tokenizer = tokenizers.Tokenizer(model)
    except Exception as error:  # the library raises nothing narrower
        raise CheckpointError(f"{_WHERE}: tokenizer.ggml.merges do not fit the tokens: {str(error)[:100]}") from None
    if pre.nfc:
        tokenizer.normalizer = normalizers.NFC()
    cuts = [pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated") for pattern in pre.patterns]
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*cuts, to_bytes])
    tokenizer.add_tokens([tokenizers.AddedToken(word, normalized=False) for word in vocabulary.words])

    def encode(s: str) -> list[int]:
        ids: list[int] = tokenizer.encode(s, add_special_tokens=False).ids
        return ids

    return encode


def _spm_model(metadata: Mapping[str, Any], tokens: list[str], types: list[int]) -> SpmModel:
    scores = _list(metadata, "tokenizer.ggml.scores")
    if len(scores) != len(tokens) or not all(isinstance(score, float | int) for score in scores):
        raise CheckpointError(f"{_WHERE}: tokenizer.ggml.scores must be {len(tokens)} numbers, one a token")
    unknown = _id(metadata, "unknown_token_id", tokens)
    types[0 if unknown is None else unknown] = UNKNOWN
    bos, eos, pad = (_id(metadata, f"{name}_token_id", tokens) for name in ("bos", "eos", "padding"))
    return SpmModel(
        [Piece(text, float(score), kind) for text, score, kind in zip(tokens, scores, types, strict=True)],
        dummy_prefix=_flag(metadata, "add_space_prefix", True),
        remove_extra_space=_flag(metadata, "remove_extra_whitespaces", False),
        bos_id=-1 if bos is None else bos,
        eos_id=-1 if eos is None else eos,
        pad_id=-1 if pad is None else pad,
    )


def _sentencepiece(metadata: Mapping[str, Any], model: SpmModel) -> PieceTokenizer:
    tokens = [piece.text for piece in model.pieces]
    # Tags such as <think> are control tokens to the encoder, but shown.
    special = _special(tokens, [piece.type for piece in model.pieces])
    vocabulary = open_model(write_model(model), model, _WHERE)
    tokenizer = _finish(metadata, tokens, special, vocabulary.encode_text, vocabulary.pieces, True)
    tokenizer.spaced, tokenizer.each_byte = vocabulary.spaced, True
    return tokenizer


def _finish(
    metadata: Mapping[str, Any],
    tokens: Sequence[str],
    special: dict[str, int],
    encode_text: Callable[[str], list[int]],
    pieces: list[bytes],
    add_bos: bool,
) -> PieceTokenizer:
    bos, eos, pad, eot, eom = (
        _id(metadata, f"{name}_token_id", tokens) for name in ("bos", "eos", "padding", "eot", "eom")
    )
    template = metadata.get("tokenizer.chat_template")
    return PieceTokenizer(
        kind="gguf",
        n_words=len(tokens),
        bos_id=bos,
        eos_id=eos,
        pad_id=-1 if pad is None else pad,
        stop_ids=stop_ids(special, eos, eot, eom),
        special=special,
        add_bos=_flag(metadata, "add_bos_token", add_bos) and bos is not None,
        chat_template=template if isinstance(template, str) else None,
        encode_text=encode_text,
        pieces=pieces,
    )


def _types(metadata: Mapping[str, Any], tokens: Sequence[str]) -> list[int]:
    """The type of each token, with those that the file calls bos, eos, eot or eom made control tokens."""
    if "tokenizer.ggml.token_type" not in metadata:
        types = [NORMAL] * len(tokens)
    else:
        types = list(_list(metadata, "tokenizer.ggml.token_type"))
    if len(types) != len(tokens) or not all(t in (NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE) for t in types):
        raise CheckpointError(f"{_WHERE}: tokenizer.ggml.token_type must be {len(tokens)} numbers from 1 to 6")
    for name in ("bos", "eos", "eot", "eom"):
        i = _id(metadata, f"{name}_token_id", tokens)
        if i is not None and types[i] != UNKNOWN:
            types[i] = CONTROL
    return types


def _special(tokens: Sequence[str], types: list[int]) -> dict[str, int]:
    return {
        text: i
        for i, (text, kind) in enumerate(zip(tokens, types, strict=True))
        if text and (kind == CONTROL or (kind == USER_DEFINED and is_tag(text)))
    }


def _merges(metadata: Mapping[str, Any], vocab: Mapping[str, int]) -> list[tuple[str, str]]:
    """The merges, in order, whose parts and result are plain tokens."""
    merges = []
    for line in _texts(metadata, "tokenizer.ggml.merges"):
        # A space is written as another character in this alphabet, so the first one divides.
        left, _, right = line.partition(" ")
        if left in vocab and right in vocab and left + right in vocab:
            merges.append((left, right))
    return merges


def _get(metadata: Mapping[str, Any], key: str, kind: type[_T]) -> _T:
    value = metadata.get(key)
    if not isinstance(value, kind):
        found = "missing" if key not in metadata else f"a {type(value).__name__}"
        raise CheckpointError(f"{_WHERE}: {key} is {found}, must be a {kind.__name__}; give --tokenizer_path instead")
    return value


def _list(metadata: Mapping[str, Any], key: str) -> list[Any]:
    value = _get(metadata, key, list)
    if not value:
        raise CheckpointError(f"{_WHERE}: {key} is empty; give --tokenizer_path instead")
    return value


def _texts(metadata: Mapping[str, Any], key: str) -> list[str]:
    values = _list(metadata, key)
    if not all(isinstance(value, str) for value in values):
        raise CheckpointError(f"{_WHERE}: {key} holds something else than strings")
    return values


def _flag(metadata: Mapping[str, Any], name: str, default: bool) -> bool:
    value = metadata.get(f"tokenizer.ggml.{name}", default)
    if not isinstance(value, bool):
        raise CheckpointError(f"{_WHERE}: tokenizer.ggml.{name} is {value!r}, must be true or false")
    return value


def _id(metadata: Mapping[str, Any], name: str, tokens: Sequence[str]) -> int | None:
    value = metadata.get(f"tokenizer.ggml.{name}")
    if value is None:
        return None
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < len(tokens):
        raise CheckpointError(f"{_WHERE}: tokenizer.ggml.{name} is {value!r}, must be from 0 to {len(tokens) - 1}")
    return value
