"""Dialogs: who said what, and what a dialog must be before any format takes it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypedDict

from llama_dist.errors import RequestError

ROLES = ("system", "user", "assistant", "tool")


class Message(TypedDict):
    """One turn: `role` is one of ROLES, `content` plain text."""

    role: str
    content: str


Dialog = Sequence[Message]


def check_dialog(dialog: Dialog) -> None:
    """RequestError unless there are messages with known roles and texts, and the last is not the assistant's."""
    if isinstance(dialog, str) or not isinstance(dialog, Sequence):
        raise refusal(f"messages are a {type(dialog).__name__}, must be a list of objects with role and content")
    if not dialog:
        raise refusal("there are no messages; give at least one with role 'user'")
    for at, message in enumerate(dialog):
        if not isinstance(message, dict) or not isinstance(message.get("content"), str):
            raise refusal(f"message {at} is no object with a role and a text as content")
        if message.get("role") not in ROLES:
            raise refusal(f"message {at} has role {str(message.get('role'))[:40]!r}, must be one of {', '.join(ROLES)}")
    if dialog[-1]["role"] == "assistant":
        raise refusal("the last message is the assistant's, must be one to answer")


def in_turns(dialog: Dialog) -> tuple[str | None, list[str]]:
    """The system prompt, if any, and the contents of user, assistant, user, ... in strict turn, the user's last."""
    system = dialog[0]["content"] if dialog[0]["role"] == "system" else None
    rest = dialog if system is None else dialog[1:]
    for at, message in enumerate(rest):
        expected = ("user", "assistant")[at % 2]
        if message["role"] != expected:
            raise refusal(
                f"message {at + len(dialog) - len(rest)} has role {message['role']!r}, this chat format wants"
                f" {expected!r} there: an optional system, then user and assistant in turn"
            )
    if len(rest) % 2 == 0:
        raise refusal("this chat format wants the last message to be the user's")
    return system, [message["content"] for message in rest]


def refusal(message: str) -> RequestError:
    """The error for a dialog that cannot be encoded."""
    return RequestError(message, "messages")
