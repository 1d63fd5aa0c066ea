"""A conversation's history, kept within the model's sequence length. No ranks, no terminal."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from llama_dist.errors import RequestError
from llama_dist.text.chat import Dialog, Message


def answer_room(max_seq_len: int, max_gen_len: int | None) -> int:
    """Tokens kept free for an answer: the longest one asked for, but at most a quarter of the sequence."""
    quarter = max(1, max_seq_len // 4)
    return quarter if max_gen_len is None else min(max(1, max_gen_len), quarter)


@dataclass
class Conversation:
    """Turns of user and assistant after an optional system prompt. `encode` gives a dialog's ids.

    `max_prompt`: tokens that system prompt, history and new message may take together.
    """

    encode: Callable[[Dialog], list[int]]
    max_prompt: int
    system: str | None = None
    turns: list[tuple[str, str]] = field(default_factory=list)

    def _dialog(self, turns: list[tuple[str, str]], message: str) -> Dialog:
        dialog: list[Message] = [] if self.system is None else [{"role": "system", "content": self.system}]
        for question, answer in turns:
            dialog += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        return [*dialog, {"role": "user", "content": message}]

    def ask(self, message: str) -> tuple[list[int], int]:
        """The ids that put `message` to the model, and how many of the oldest turns were dropped to make room.

        Raises RequestError when it does not fit even alone; the history is then as it was.
        """
        for dropped in range(len(self.turns) + 1):
            ids = self.encode(self._dialog(self.turns[dropped:], message))
            if len(ids) <= self.max_prompt:
                del self.turns[:dropped]
                return ids, dropped
        raise RequestError(
            f"the message takes {len(ids)} tokens with the system prompt, {self.max_prompt} leave room for an answer; "
            "shorten it or raise --max_seq_len",
            "prompt",
        )

    def answered(self, message: str, answer: str) -> None:
        self.turns.append((message, answer))

    def reset(self) -> None:
        self.turns.clear()
