"""A GGUF's tokenizer as the files that other formats keep it in: tokenizer.json or tokenizer.model, and their config.

tokenizer.json is that of Hugging Face `tokenizers`; tokenizer.model is sentencepiece's (see spm_proto).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from llama_dist.text.gguf_vocab import BytePairs, read_vocabulary, tokenizer_from_gguf
from llama_dist.text.pretokenizers import PreTokenizer
from llama_dist.text.spm_proto import UNKNOWN, write_model
from llama_dist.text.tokenizer import PieceTokenizer


def tokenizer_files(metadata: Mapping[str, Any]) -> dict[str, bytes]:
    """The tokenizer of a GGUF's metadata as files by name.

    A `gpt2` vocabulary gives tokenizer.json, a `llama` one tokenizer.model; tokenizer_config.json names bos, eos and
    pad and holds the chat template. `load_tokenizer` and transformers encode with them as `tokenizer_from_gguf` does.
    Stop ids that only the metadata tell (eot, eom) have no place in them: those belong into generation_config.json.
    CheckpointError for metadata that `tokenizer_from_gguf` refuses.
    """
    vocabulary, tokenizer = read_vocabulary(metadata), tokenizer_from_gguf(metadata)
    config = _config(tokenizer)
    if isinstance(vocabulary, BytePairs):
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
        files = {"tokenizer.json": _json(_tokenizer_json(vocabulary, tokenizer), None)}
    else:
        config |= {"tokenizer_class": "LlamaTokenizer", "add_eos_token": False, "legacy": True}
        config["unk_token"] = next(piece.text for piece in vocabulary.pieces if piece.type == UNKNOWN)
        files = {"tokenizer.model": write_model(vocabulary)}
    return {**files, "tokenizer_config.json": _json(config, 2)}


def _config(tokenizer: PieceTokenizer) -> dict[str, Any]:
    """tokenizer_config.json but for what depends on the kind."""
    config: dict[str, Any] = {"add_bos_token": tokenizer.add_bos, "clean_up_tokenization_spaces": False}
    for name, i in (("bos", tokenizer.bos_id), ("eos", tokenizer.eos_id), ("pad", tokenizer.pad_id)):
        text = tokenizer.text_of(i)
        # A token named here is hidden when decoding: one that is shown must not be.
        if text and not tokenizer.pieces[tokenizer.special[text]]:
            config[f"{name}_token"] = text
    if tokenizer.chat_template is not None:
        config["chat_template"] = tokenizer.chat_template
    return config


def _tokenizer_json(vocabulary: BytePairs, tokenizer: PieceTokenizer) -> dict[str, Any]:
    """Ids of unused tokens are left free, so that no word can be one: with `whole_words` every word is looked up."""
    ids = vocabulary.usable | vocabulary.special
    added = sorted({*vocabulary.special, *vocabulary.words}, key=ids.__getitem__)
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [_added(ids[text], text, special=not tokenizer.pieces[ids[text]]) for text in added],
        "normalizer": {"type": "NFC"} if vocabulary.pre.nfc else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [*_cuts(vocabulary.pre), byte_level]},
        "post_processor": _bos_first(tokenizer),
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": vocabulary.pre.whole_words,
            "vocab": dict(sorted(ids.items(), key=lambda item: item[1])),
            "merges": vocabulary.merges,
        },
    }


def _added(i: int, text: str, special: bool) -> dict[str, Any]:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    return {"id": i, "content": text, **flags, "special": special}


def _cuts(pre: PreTokenizer) -> list[dict[str, Any]]:
    return [
        {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
        for pattern in pre.patterns
    ]


def _bos_first(tokenizer: PieceTokenizer) -> dict[str, Any] | None:
    """The post-processor that puts bos before a text where the GGUF says so."""
    text = tokenizer.text_of(tokenizer.bos_id)
    if not tokenizer.add_bos or not text:
        return None
    first, second = ({"Sequence": {"id": name, "type_id": n}} for n, name in enumerate("AB"))
    bos, again = ({"SpecialToken": {"id": text, "type_id": n}} for n in range(2))
    return {
        "type": "TemplateProcessing",
        "single": [bos, first],
        "pair": [bos, first, again, second],
        "special_tokens": {text: {"id": text, "ids": [tokenizer.bos_id], "tokens": [text]}},
    }


def _json(value: dict[str, Any], indent: int | None) -> bytes:
    return (json.dumps(value, ensure_ascii=False, indent=indent) + "\n").encode()
