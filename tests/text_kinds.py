"""One tokenizer of every kind and manner, by name, for the tests of llama_dist.text."""

from __future__ import annotations

import functools
import json
import tempfile
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from llama_dist.checkpoint.files import File
from llama_dist.checkpoint.gguf_header import read_gguf_header
from llama_dist.text.load import load_tokenizer, tokenizer_from_gguf
from llama_dist.text.spm_proto import Piece, read_model
from llama_dist.text.tokenizer import PieceTokenizer
from tests import tiny_tokenizer
from tests.assets import llama3_tokenizer, mistral_tokenizer, smollm2_gguf

MISTRAL_V3 = "mistral_instruct_tokenizer_240323.model.v3"
MISTRAL_V7 = "mistral_instruct_tokenizer_241114.model.v7"
KINDS = (
    "mistral-v1",
    "mistral-v3",
    "llama3",
    "smollm2-gguf",
    "mistral-gguf",
    "tiny-json",
    "tags-json",
    "fallback-json",
    "prefix-json",
)
SENTENCEPIECE_LIKE = ("mistral-v1", "mistral-v3", "mistral-gguf", "fallback-json", "prefix-json")

AWKWARD = (
    "",
    " ",
    "Hello",
    " leading and trailing ",
    "two  spaces,\ttab\n\nand lines\r\n",
    "don't WE'LL it's 1234567 3.14 x=y",
    "\u4f60\u597d\uff0c\u4e16\u754c",
    "emoji \U0001f600\U0001f468\u200d\U0001f469\u200d\U0001f467 flags \U0001f1eb\U0001f1f7",
    "e\u0301 vs \u00e9, \u0130 \u1e9e \ufb01",
    "\x00 nul \x7f \ufeff bom \u200b",
    "def f(x):\n    return x  # <code>\n",
    "<s>x</s> [INST] <|im_start|>user<|im_end|><|eot_id|>",
)
BLANKS = "  \n"


@functools.cache
def load_kind(name: str) -> PieceTokenizer:
    """The tokenizer of that name; skips the calling test where a real file cannot be fetched."""
    if name == "mistral-v1":
        return load_tokenizer(mistral_tokenizer())
    if name == "mistral-v3":
        return load_tokenizer(mistral_tokenizer(MISTRAL_V3))
    if name == "llama3":
        return load_tokenizer(llama3_tokenizer())
    if name == "smollm2-gguf":
        return tokenizer_from_gguf(smollm2_metadata())
    if name == "mistral-gguf":
        return tokenizer_from_gguf(mistral_metadata())
    config = {"bos_token": "<s>", "eos_token": "</s>"}
    return from_json({"tiny-json": tiny_tokenizer.tokenizer_json, **_MADE}[name](), tokenizer_config=config)


def from_json(spec: dict[str, Any], **beside: dict[str, Any]) -> PieceTokenizer:
    """A tokenizer.json loaded from a folder of its own; `beside` are other files there by their stem."""
    with tempfile.TemporaryDirectory() as folder:
        for stem, content in {"tokenizer": spec, **beside}.items():
            (Path(folder) / f"{stem}.json").write_text(json.dumps(content))
        return load_tokenizer(folder)


@functools.cache
def smollm2_metadata() -> dict[str, Any]:
    file = File(smollm2_gguf())
    try:
        return read_gguf_header(file).metadata
    finally:
        file.close()


@functools.cache
def mistral_pieces() -> list[Piece]:
    path = mistral_tokenizer()
    return read_model(path.read_bytes(), str(path)).pieces


def mistral_metadata() -> dict[str, Any]:
    """What llama.cpp writes for Mistral's first tokenizer."""
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": [piece.text for piece in mistral_pieces()],
        "tokenizer.ggml.scores": [piece.score for piece in mistral_pieces()],
        "tokenizer.ggml.token_type": [piece.type for piece in mistral_pieces()],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.add_bos_token": True,
    }


def added(i: int, content: str, **flags: bool) -> dict[str, Any]:
    """An entry of `added_tokens`."""
    return {"id": i, "content": content, "single_word": False, "lstrip": False, "rstrip": False} | {
        "normalized": False,
        "special": True,
        **flags,
    }


def tags_json() -> dict[str, Any]:
    """The tiny vocabulary with added tokens of every sort behind it."""
    spec = tiny_tokenizer.tokenizer_json()
    n = tiny_tokenizer.N_WORDS
    spec["normalizer"] = {"type": "NFC"}
    spec["added_tokens"] += [
        added(n, "<think>", special=False),
        added(n + 1, "</think>", special=False, normalized=True),
        added(n + 2, "<|sep|>", lstrip=True, rstrip=True, normalized=True),
        added(n + 3, BLANKS, special=False),
        added(n + 4, "tool"),
        added(n + 5, "\u2603"),
    ]
    return spec


def fallback_json() -> dict[str, Any]:
    """Mistral's first vocabulary as transformers writes Llama's: merges over all pairs of pieces that make a piece."""
    pieces = mistral_pieces()
    vocab = {piece.text: i for i, piece in enumerate(pieces)}
    merges: list[tuple[float, str, str]] = []
    for text, i in vocab.items():
        pairs = [(text[:n], text[n:]) for n in range(1, len(text)) if text[:n] in vocab and text[n:] in vocab]
        merges += [(-pieces[i].score, *pair) for pair in sorted(pairs, key=lambda p: (vocab[p[0]], vocab[p[1]]))]
    merges.sort(key=lambda merge: merge[0])
    # What would make <s> of plain text if the merges were kept.
    merges += [(0, "<", "s>"), (0, "<s", ">"), (0, "s", ">"), (0, "<", "s")]
    vocab |= {"s>": len(vocab), "<s": len(vocab) + 1}
    return {
        "version": "1.0",
        "truncation": {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0},
        "padding": None,
        "added_tokens": [added(0, "<unk>"), added(1, "<s>"), added(2, "</s>")],
        "normalizer": {
            "type": "Sequence",
            "normalizers": [
                {"type": "Prepend", "prepend": "\u2581"},
                {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"},
            ],
        },
        "pre_tokenizer": None,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
        },
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0},
            ],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": "<unk>",
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": vocab,
            "merges": [[left, right] for _, left, right in merges],
        },
    }


def prefix_json() -> dict[str, Any]:
    """The same in the newer manner: a space goes before the very first text only, not behind a control token."""
    spec = fallback_json()
    spec["truncation"] = spec["normalizer"] = None
    metaspace = {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "first", "split": False}
    spec["pre_tokenizer"] = metaspace
    return spec


_MADE = {"tags-json": tags_json, "fallback-json": fallback_json, "prefix-json": prefix_json}


def tricky_text(tokenizer: PieceTokenizer) -> st.SearchStrategy[str]:
    """Any text, with control tokens in it whole, cut, repeated and nested."""
    tokens = st.sampled_from(sorted(tokenizer.special)[:40])
    cut = st.tuples(tokens, st.integers(0, 30), st.text(max_size=2)).map(lambda t: t[0][: t[1]] + t[2] + t[0][t[1] :])
    nested = st.tuples(tokens, tokens, st.integers(1, 4)).map(lambda t: t[0][: t[2]] + t[1] + t[0][t[2] :])
    part = st.one_of(st.text(max_size=8), tokens, cut, nested, st.sampled_from([" ", "\n", "<", ">", "|>", "[", "]"]))
    return st.lists(part, max_size=6).map("".join)
