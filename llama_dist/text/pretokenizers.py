"""How a GGUF's byte-level BPE cuts text into words before merging, by its `tokenizer.ggml.pre`.

The names are llama.cpp's (`llama-vocab.cpp`); the expressions are those of the models' own tokenizer files.
"""

from __future__ import annotations

from dataclasses import dataclass

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True)
class PreTokenizer:
    """`patterns` cut one after the other. `whole_words`: a word that is in the vocabulary is not merged from parts.

    `nfc`: text is normalised first. `add_bos`: what holds where the file does not say.
    """

    patterns: tuple[str, ...]
    whole_words: bool = False
    nfc: bool = False
    add_bos: bool = False


_LLAMA3_ROW = PreTokenizer((_LLAMA3,), whole_words=True, add_bos=True)
_QWEN2_ROW = PreTokenizer((_QWEN2,), nfc=True)
_GPT2_ROW = PreTokenizer((_GPT2,))

PRE_TOKENIZERS: dict[str, PreTokenizer] = {
    "default": _GPT2_ROW,
    "gpt-2": _GPT2_ROW,
    "smollm": PreTokenizer((r"\p{N}", _GPT2)),
    "llama-bpe": _LLAMA3_ROW,
    "llama3": _LLAMA3_ROW,
    "llama-v3": _LLAMA3_ROW,
    "smaug-bpe": _LLAMA3_ROW,
    "qwen2": _QWEN2_ROW,
    "deepseek-r1-qwen": _QWEN2_ROW,
    "tekken": PreTokenizer((_TEKKEN,), whole_words=True, add_bos=True),
}
