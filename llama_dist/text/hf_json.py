"""tokenizer.json of Hugging Face `tokenizers`: byte-level BPE (Llama 3, Qwen, SmolLM) and BPE with byte fallback.

The library is given a copy of the file that holds no control token at all: not among the added tokens, not in the
vocabulary, not as the result of a merge. So no text, however it is cut or normalised, can encode to one.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from llama_dist.errors import CheckpointError
from llama_dist.text.byte_level import byte_level_pieces
from llama_dist.text.sidecar import Sidecar, parse_object
from llama_dist.text.tokenizer import PieceTokenizer, byte_of, is_tag, spaced_piece, stop_ids


@dataclass(frozen=True)
class _Added:
    """One entry of `added_tokens`. `special` ones are hidden when decoding."""

    id: int
    content: str
    special: bool
    lstrip: bool
    rstrip: bool

    @property
    def control(self) -> bool:
        # Runs of blanks and words that someone added are text like any other.
        return self.special or is_tag(self.content)


def load_hf_json(data: bytes, where: str, sidecar: Sidecar) -> PieceTokenizer:
    """The tokenizer in the bytes of a tokenizer.json; `where` names it in errors.

    `add_bos` is `add_bos_token` of tokenizer_config.json, else whether the file's post-processor puts a token first.
    Lossless unless the file normalises (NFC for Qwen). CheckpointError for models other than BPE, decoders that are
    neither byte-level nor of sentencepiece's kind, and damaged files.
    """
    spec = parse_object(data, where)
    vocab, added = _read(spec, where)
    prefix = _first_token(spec.get("post_processor"))
    ids = {**vocab, **{token.content: token.id for token in added}}
    special = {token.content: token.id for token in added if token.control}
    named = {name: text for name in ("bos", "eos", "pad") if (text := getattr(sidecar, name)) in ids and text}
    special.update({text: ids[text] for text in named.values()})
    bos = named.get("bos") or prefix
    bos_id = ids.get(bos, sidecar.bos_id) if bos else sidecar.bos_id
    eos_id = ids[named["eos"]] if "eos" in named else next(iter(sidecar.eos_ids), None)
    add_bos = prefix is not None and prefix == bos if sidecar.add_bos is None else sidecar.add_bos
    hidden = {token.id for token in added if token.special} | {ids[text] for text in named.values()}
    pieces, spaced = _pieces(spec, ids, hidden, where)
    encode_text, encode_run = _encoders(spec, added, special, where)
    return PieceTokenizer(
        kind="tokenizer.json",
        n_words=len(pieces),
        bos_id=bos_id,
        eos_id=eos_id,
        pad_id=ids[named["pad"]] if "pad" in named else -1,
        stop_ids=stop_ids(special, eos_id, *sidecar.eos_ids),
        special=special,
        add_bos=add_bos and bos_id is not None,
        chat_template=sidecar.chat_template,
        encode_text=encode_text,
        pieces=pieces,
        spaced=spaced,
        encode_run=encode_run,
        strip_left=frozenset(token.content for token in added if token.lstrip and token.control),
        strip_right=frozenset(token.content for token in added if token.rstrip and token.control),
    )


def _read(spec: dict[str, Any], where: str) -> tuple[dict[str, int], list[_Added]]:
    model = spec.get("model")
    if not isinstance(model, dict):
        raise CheckpointError(
            f"{where} is JSON but no tokenizer.json: it has no 'model'; give --tokenizer_path another"
        )
    # Files of before 2021 leave the type out; only BPE has merges.
    kind = model.get("type") or ("BPE" if "merges" in model else None)
    if kind != "BPE":
        raise CheckpointError(f"{where}: tokenizer model {kind!r} is not supported, only BPE is")
    vocab, added = model.get("vocab"), spec.get("added_tokens") or []
    limit = 1 << 24
    if not isinstance(vocab, dict) or not vocab or not all(type(i) is int and 0 <= i < limit for i in vocab.values()):
        raise CheckpointError(f"{where}: 'vocab' must map texts to ids from 0 to {limit - 1}; fetch the file again")
    try:
        tokens = [
            _Added(t["id"], t["content"], *(bool(t.get(f)) for f in ("special", "lstrip", "rstrip"))) for t in added
        ]
    except (TypeError, KeyError, AttributeError):
        raise CheckpointError(f"{where}: 'added_tokens' must hold objects with id and content") from None
    if not all(type(t.id) is int and 0 <= t.id < limit and isinstance(t.content, str) and t.content for t in tokens):
        raise CheckpointError(f"{where}: 'added_tokens' must have ids from 0 to {limit - 1} and texts")
    if max([*vocab.values(), *(t.id for t in tokens)]) >= 4 * (len(vocab) + len(tokens)) + 65536:
        raise CheckpointError(
            f"{where}: an id is far above the number of tokens, {len(vocab) + len(tokens)}; file damaged"
        )
    return vocab, tokens


def _first_token(processor: Any) -> str | None:
    """The text of the token that a post-processor puts before a single sequence."""
    if not isinstance(processor, dict):
        return None
    kind = processor.get("type")
    if kind == "Sequence":
        inner = processor.get("processors")
        return next((t for p in inner if (t := _first_token(p))), None) if isinstance(inner, list) else None
    if kind == "TemplateProcessing":
        single = processor.get("single")
        first = single[0] if isinstance(single, list) and single else None
        token = first.get("SpecialToken") if isinstance(first, dict) else None
        return token.get("id") if isinstance(token, dict) and isinstance(token.get("id"), str) else None
    if kind in ("BertProcessing", "RobertaProcessing"):
        cls = processor.get("cls")
        return cls[0] if isinstance(cls, list) and cls and isinstance(cls[0], str) else None
    return None


def _pieces(
    spec: dict[str, Any], ids: Mapping[str, int], hidden: set[int], where: str
) -> tuple[list[bytes], frozenset[int]]:
    """The bytes of every id, read off the file's decoder, and the ids that lose their leading space at the start."""
    steps = {step["type"]: step for step in _steps(spec.get("decoder"), "decoders")}
    size = max(ids.values()) + 1
    pieces = [b""] * size
    if "ByteLevel" in steps:
        plain = {token["content"] for token in spec.get("added_tokens") or []}
        table = byte_level_pieces(ids)
        for (text, i), piece in zip(ids.items(), table, strict=True):
            # The decoder translates added tokens too where it can, but they were added as they read.
            pieces[i] = b"" if i in hidden else text.encode("utf-8", "replace") if text in plain else piece
        return pieces, frozenset()
    if "Metaspace" not in steps and steps.get("Replace", {}).get("pattern") != {"String": "\u2581"}:
        raise CheckpointError(f"{where}: decoder {sorted(steps)} is neither byte-level nor of sentencepiece's kind")
    for text, i in ids.items():
        if i not in hidden:
            pieces[i] = ("ByteFallback" in steps and byte_of(text)) or spaced_piece(text)
    meta = steps.get("Metaspace", {})
    strips = steps.get("Strip", {}).get("start", 0) or (
        meta and meta.get("prepend_scheme", "always" if meta.get("add_prefix_space", True) else "never") != "never"
    )
    return pieces, frozenset(i for i, piece in enumerate(pieces) if strips and piece[:1] == b" ")


def _steps(part: Any, inner: str) -> list[dict[str, Any]]:
    """A component and, where it is a Sequence, its members."""
    if not isinstance(part, dict) or not isinstance(part.get("type"), str):
        return []
    if part["type"] != "Sequence":
        return [part]
    members = part.get(inner)
    return [step for member in members for step in _steps(member, inner)] if isinstance(members, list) else []


def _encoders(
    spec: dict[str, Any], added: list[_Added], special: Mapping[str, int], where: str
) -> tuple[Callable[[str], list[int]], Callable[[str], list[int]] | None]:
    """Encoders of text at the beginning, and, where that gets a space which other text does not, of other text."""
    plain = _without_control(spec, added, special, where)
    first = _encoder(plain, where)
    schemes = [step for step in _steps(plain.get("pre_tokenizer"), "pretokenizers") if step["type"] == "Metaspace"]
    if not any(step.get("prepend_scheme") == "first" for step in schemes):
        return first, None
    for step in schemes:
        step["prepend_scheme"] = "never"
    return first, _encoder(plain, where)


def _without_control(
    spec: dict[str, Any], added: list[_Added], special: Mapping[str, int], where: str
) -> dict[str, Any]:
    """The file without control tokens, truncation, padding and post-processor. Shares no list or dict it changes."""
    model = dict(spec["model"])
    vocab: dict[str, int] = model["vocab"]
    banned = {text for text in special if text in vocab}
    if banned:
        try:
            model["merges"] = [m for m in model.get("merges", []) if not _touches(m, banned)]
        except (TypeError, AttributeError, ValueError):
            raise CheckpointError(f"{where}: 'merges' must hold pairs of texts; fetch the file again") from None
    # The model needs its own unknown token by name; without merges to it no text spells it.
    kept = {text: i for text, i in vocab.items() if text not in banned or text == model.get("unk_token")}
    texts = [token.content for token in added if not token.control and token.content not in special]
    # In the vocabulary they keep their ids; the library would number them anew.
    model["vocab"] = {**kept, **{token.content: token.id for token in added if token.content in texts}}
    tokens = [entry for entry in spec.get("added_tokens") or [] if entry["content"] in texts]
    absent = {"truncation": None, "padding": None, "post_processor": None}
    rest: dict[str, Any] = json.loads(json.dumps(spec | absent | {"model": {}}))
    return rest | {"model": model, "added_tokens": tokens}


def _touches(merge: Any, banned: set[str]) -> bool:
    left, right = merge.split(" ", 1) if isinstance(merge, str) else merge
    return left in banned or right in banned or left + right in banned


def _encoder(spec: dict[str, Any], where: str) -> Callable[[str], list[int]]:
    import tokenizers

    try:
        tokenizer = tokenizers.Tokenizer.from_str(json.dumps(spec))
    except Exception as error:  # the library raises nothing narrower
        reason = " ".join(str(error).split())[:150]
        raise CheckpointError(f"{where}: the tokenizers library refuses the file: {reason}") from None

    def encode(s: str) -> list[int]:
        ids: list[int] = tokenizer.encode(s, add_special_tokens=False).ids
        return ids

    return encode
