"""One tiny byte-level BPE vocabulary in the forms of tokenizer.json, GGUF metadata and tiktoken.

Five control tokens, the 256 bytes and 32 merges: 293 words, a prime. The tiktoken form has the bytes and merges
first and Llama 3's 256 control tokens after them: 544 words.
"""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import gguf

SPECIAL = ("<s>", "</s>", "<|im_start|>", "<|im_end|>", "<pad>")
BOS, EOS, IM_START, IM_END, PAD = range(5)
_MERGES = """\
Ġ t|h e|i n|Ġ a|Ġt he|r e|o n|e r|Ġ s|a t|Ġ w|o u|e s|in g|Ġ o|i s|Ġ b|o r|Ġ f|e n|a n|Ġ c|a l|Ġ p|e d|Ġ m|l l|i t|
Ġa n|Ġan d|y o|yo u""".replace("\n", "")
MERGES = tuple((left, right) for left, right in (merge.split(" ") for merge in _MERGES.split("|")))
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def byte_letters() -> dict[int, str]:
    """GPT-2's printable letter for each byte: itself where it prints, else the next free one from U+0100."""
    prints = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = [b for b in range(256) if b not in prints]
    return {b: chr(b) for b in prints} | {b: chr(0x100 + n) for n, b in enumerate(hidden)}


def words() -> list[str]:
    """The vocabulary in id order."""
    letters = byte_letters()
    return [*SPECIAL, *(letters[b] for b in range(256)), *(left + right for left, right in MERGES)]


N_WORDS = len(words())
N_TIKTOKEN_WORDS = 256 + len(MERGES) + 256


def tokenizer_json() -> dict[str, Any]:
    """tokenizer.json: byte-level BPE that begins every text with <s>."""
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": i, "content": text, **plain} for i, text in enumerate(SPECIAL)],
        "normalizer": None,
        "pre_tokenizer": byte_level,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [BOS], "tokens": ["<s>"]}},
        },
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {word: i for i, word in enumerate(words())},
            "merges": [f"{left} {right}" for left, right in MERGES],
        },
    }


def save_hf(folder: Path) -> None:
    """tokenizer.json and tokenizer_config.json with a ChatML template."""
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "pad_token": "<pad>",
        "add_bos_token": True,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 256,
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer_json(), ensure_ascii=False), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2))


def save_tiktoken(path: Path) -> None:
    """Llama 3's form: a line a word, base64 of its bytes and its rank."""
    byte_of = {letter: b for b, letter in byte_letters().items()}
    ranked = [bytes([b]) for b in range(256)]
    ranked += [bytes(byte_of[letter] for letter in left + right) for left, right in MERGES]
    path.write_text("".join(f"{base64.b64encode(word).decode()} {rank}\n" for rank, word in enumerate(ranked)))


def add_to_gguf(out: gguf.GGUFWriter, n_words: int) -> None:
    """The metadata llama.cpp writes for a GPT-2 style tokenizer, filled up with unused words to `n_words`."""
    unused = [f"[unused{n}]" for n in range(n_words - N_WORDS)]
    kinds = [gguf.TokenType.CONTROL] * len(SPECIAL) + [gguf.TokenType.NORMAL] * (N_WORDS - len(SPECIAL))
    out.add_tokenizer_model("gpt2")
    out.add_tokenizer_pre("gpt-2")
    out.add_token_list([*words(), *unused])
    out.add_token_types([*kinds, *([gguf.TokenType.UNUSED] * len(unused))])
    out.add_token_merges([f"{left} {right}" for left, right in MERGES])
    out.add_bos_token_id(BOS)
    out.add_eos_token_id(EOS)
    out.add_pad_token_id(PAD)
    out.add_add_bos_token(True)
    out.add_chat_template(CHAT_TEMPLATE)
