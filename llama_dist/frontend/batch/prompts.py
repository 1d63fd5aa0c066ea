"""Prompts and dialogs of a request as token ids, within what the model takes."""

from __future__ import annotations

import datetime
from dataclasses import dataclass
from typing import Any

from llama_dist.errors import RequestError
from llama_dist.frontend.batch import values
from llama_dist.text.base import Tokenizer
from llama_dist.text.chat import Message, encode_dialog


@dataclass(frozen=True)
class Encoder:
    """A tokenizer with the model's bounds. `chat_format` None: this checkpoint has none, and `no_chat` says so.

    `now` is the time that a chat template may print, the same for all of a job.
    """

    tokenizer: Tokenizer
    vocab_size: int
    max_seq_len: int
    chat_format: str | None
    no_chat: str = ""
    now: datetime.datetime | None = None

    def prompt(self, value: Any, add_special_tokens: bool) -> tuple[int, ...]:
        """The ids of a prompt: a text, or ids already. RequestError for anything else."""
        if isinstance(value, str):
            tokenizer = self.tokenizer
            return tuple(tokenizer.encode(value, bos=tokenizer.add_bos and add_special_tokens, eos=False))
        if not isinstance(value, list):
            raise values.wrong("prompt", value, "a text or a list of token ids")
        if any(isinstance(item, (str, list)) for item in value):
            raise RequestError("prompt is a list of several prompts; give each a line of its own", "prompt")
        return values.token_ids("prompt", value, self.vocab_size)

    def dialog(self, messages: Any) -> tuple[int, ...]:
        """The ids that a dialog's answer follows. RequestError for a dialog that has no place in the chat format."""
        if self.chat_format is None:
            raise RequestError(self.no_chat, "messages")
        if not isinstance(messages, list):
            raise values.wrong("messages", messages, "a list of objects with role and content")
        dialog = [_message(at, message) for at, message in enumerate(messages)]
        return tuple(encode_dialog(self.tokenizer, dialog, self.chat_format, self.now))

    def check_length(self, prompt: tuple[int, ...]) -> None:
        """RequestError, with field `prompt_length` where the prompt is too long."""
        if not prompt:
            raise RequestError("prompt is empty, must have at least 1 token", "prompt")
        if len(prompt) > self.max_seq_len:
            raise RequestError(
                f"the prompt has {len(prompt)} tokens, more than max_seq_len {self.max_seq_len}; "
                "shorten it or raise --max_seq_len",
                "prompt_length",
            )


def _message(at: int, message: Any) -> Message:
    if not isinstance(message, dict):
        raise values.wrong(f"messages[{at}]", message, "an object with role and content")
    for name, value in message.items():
        if name not in ("role", "content", "name") and value is not None:
            raise RequestError(
                f"messages[{at}].{name[:60]} is not supported; a message has role and content", "messages"
            )
    role = values.text(f"messages[{at}].role", message.get("role"))
    return {"role": "system" if role == "developer" else role, "content": _content(at, message.get("content"))}


def _content(at: int, content: Any) -> str:
    """A text, or OpenAI's list of parts, of which only texts can be read."""
    if not isinstance(content, list):
        return values.text(f"messages[{at}].content", content)
    parts = []
    for part in content:
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise RequestError(f"messages[{at}].content has a part that is no text", "messages")
        parts.append(part["text"])
    return "".join(parts)
