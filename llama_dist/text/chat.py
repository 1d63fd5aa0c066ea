"""Chat formats by name: which one a checkpoint uses, and a dialog as the prompt the assistant's answer follows."""

from __future__ import annotations

import datetime

from llama_dist.errors import ConfigError
from llama_dist.text.base import Tokenizer
from llama_dist.text.chat_formats import encode_chatml, encode_llama2, encode_llama3, encode_mistral, has_special_tags
from llama_dist.text.chat_template import encode_template
from llama_dist.text.dialog import Dialog, Message, check_dialog

__all__ = ["CHAT_FORMATS", "Dialog", "Message", "encode_dialog", "has_special_tags", "pick_chat_format"]

_ENCODERS = {
    "llama2": encode_llama2,
    "llama3": encode_llama3,
    "chatml": encode_chatml,
    "mistral": encode_mistral,
}
CHAT_FORMATS = (*_ENCODERS, "template")

_NEEDED_TOKENS = {
    "llama3": ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    "chatml": ("<|im_start|>", "<|im_end|>"),
}


def encode_dialog(
    tokenizer: Tokenizer, dialog: Dialog, chat_format: str, now: datetime.datetime | None = None
) -> list[int]:
    """The prompt of a dialog: ids ending where the assistant's answer begins.

    `chat_format` is one that `pick_chat_format` returned for this tokenizer. No content, whatever it holds, adds a
    control token. `now` is the time a template may print; default: the clock's. RequestError, field `messages`, for a
    dialog that the format has no place for.
    """
    check_dialog(dialog)
    if chat_format == "template":
        return encode_template(tokenizer, dialog, now)
    return _ENCODERS[chat_format](tokenizer, dialog)


def pick_chat_format(tokenizer: Tokenizer, family: str, asked: str | None) -> str:
    """`asked`, or else the checkpoint's own template, or else the format its control tokens are made for.

    `family` is ModelConfig's; it tells Mistral from Llama where both have only <s> and </s>. ConfigError if `asked`
    is unknown or cannot be written with this vocabulary, or if nothing fits.
    """
    if asked is not None:
        missing = _missing(tokenizer, asked)
        if missing:
            raise ConfigError(f"--chat_format {asked} does not fit this tokenizer: it has no {missing}")
        return asked
    candidates = ["template", "llama3", "chatml"]
    if "[INST]" in tokenizer.special or family == "mistral":
        candidates.append("mistral")
    elif {"<s>", "</s>"} <= set(tokenizer.special):
        candidates.append("llama2")
    found = next((name for name in candidates if not _missing(tokenizer, name)), None)
    if found is None:
        raise ConfigError(f"no chat format fits this checkpoint; pass --chat_format, one of {', '.join(CHAT_FORMATS)}")
    return found


def _missing(tokenizer: Tokenizer, name: str) -> str:
    """What a tokenizer lacks for a format, empty if nothing. ConfigError for an unknown name."""
    if name not in CHAT_FORMATS:
        raise ConfigError(f"--chat_format is {name!r}, must be one of {', '.join(CHAT_FORMATS)}")
    if name == "template":
        return "" if tokenizer.chat_template else "chat template"
    lacking = [token for token in _NEEDED_TOKENS.get(name, ()) if token not in tokenizer.special]
    if name != "chatml" and tokenizer.bos_id is None:
        lacking.append("beginning-of-sequence token")
    if name in ("llama2", "mistral") and tokenizer.eos_id is None:
        lacking.append("end-of-sequence token")
    return " and no ".join(lacking)
