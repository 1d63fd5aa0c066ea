"""`chat`: a conversation. Rank 0 reads lines and writes answers; the other ranks follow what it shares."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from llama_dist.engine.session import Checked, check_run, complete, open_session
from llama_dist.errors import RequestError
from llama_dist.frontend.conversation import Conversation, answer_room
from llama_dist.frontend.inbox import POLL_SECONDS, next_message
from llama_dist.frontend.lines import LineReader
from llama_dist.frontend.options import ChatOptions
from llama_dist.frontend.output import Output, note
from llama_dist.parallel.world import leave
from llama_dist.request import Completion, Request, SamplingParams, TokenEvent
from llama_dist.text.base import Tokenizer
from llama_dist.text.chat import encode_dialog, pick_chat_format
from llama_dist.text.stream import TextStream

COMMANDS = {"/help": "this list", "/reset": "forget the conversation", "/quit": "end, as does the end of input"}


class Repl:
    """What rank 0 knows of the conversation and does with its terminal."""

    def __init__(
        self,
        conversation: Conversation,
        params: SamplingParams,
        validate: Callable[[Request], None],
        tokenizer: Tokenizer,
        reader: LineReader,
        output: Output,
        interactive: bool,
    ) -> None:
        self.conversation, self.params, self.validate = conversation, params, validate
        self.tokenizer, self.reader, self.output, self.interactive = tokenizer, reader, output, interactive
        self.asked = 0
        self.message = ""
        self.stream = TextStream(tokenizer)

    def mark(self) -> None:
        """Show a human that it is their turn."""
        if self.interactive:
            note("> ", end="")

    def poll(self) -> dict[str, Any] | None:
        """The next thing all ranks are to do: a request or the end; None while there is nothing."""
        line = self.reader.poll(POLL_SECONDS)
        if line is None:
            return {"quit": True} if self.reader.ended or self.output.exit_code else None
        if line.strip() == "/quit":
            return {"quit": True}
        request = self.request(line)
        if request is None:
            self.mark()
        return None if request is None else {"request": request.to_json()}

    def request(self, line: str) -> Request | None:
        """A request for a message; None for a command, which is obeyed, or a message that is refused."""
        word = line.split(maxsplit=1)[0] if line.strip() else ""
        if not word:
            return None
        if word.startswith("/"):
            self.obey(word)
            return None
        try:
            ids, dropped = self.conversation.ask(line)
            request = Request(str(self.asked), tuple(ids), self.params)
            self.validate(request)
        except RequestError as err:
            note(f"refused: {err}")
            return None
        if dropped:
            note(f"({dropped} of the oldest turns dropped: the conversation grew too long)")
        self.asked += 1
        self.message, self.stream = line, TextStream(self.tokenizer)
        return request

    def obey(self, word: str) -> None:
        if word == "/reset":
            self.conversation.reset()
            note("(the conversation starts anew)")
        elif word == "/help":
            note("\n".join(f"{name:<8} {what}" for name, what in COMMANDS.items()))
        else:
            note(f"no command {word}; there are {', '.join(COMMANDS)}")

    def on_token(self, event: TokenEvent) -> None:
        self.output.write(self.stream.push(event.token_id))

    def finish(self, completion: Completion) -> None:
        """End the line of an answer and remember the turn."""
        self.output.write(self.stream.finish() + "\n")
        if completion.finish_reason == "length":
            note("(cut off at the longest answer)")
        self.conversation.answered(self.message, self.tokenizer.decode(list(completion.token_ids)))
        self.mark()


def prepare(options: ChatOptions) -> Callable[[], int]:
    """Check flags, checkpoint and chat format; the work comes back. Raises ConfigError or CheckpointError."""
    checked = check_run(options.run)
    style = pick_chat_format(checked.tokenizer, checked.reader.config.family, options.run.chat_format)
    return lambda: run(options, checked, style)


def run(options: ChatOptions, checked: Checked, style: str) -> int:
    """Load, then answer until the input ends. Every rank calls it alike."""
    session = open_session(options.run, checked)
    tokenizer, params, output = session.tokenizer, options.sampling, Output()
    room = answer_room(session.max_seq_len, params.max_tokens)
    conversation = Conversation(
        lambda dialog: encode_dialog(tokenizer, dialog, style), session.max_seq_len - room, options.system
    )
    interactive = sys.stdin.isatty()
    reader = LineReader(sys.stdin.fileno())
    repl = Repl(conversation, params, session.engine.validate, tokenizer, reader, output, interactive)
    on_rank_0 = session.world.rank == 0
    if on_rank_0 and interactive:
        note("type a message, or /help")
        repl.mark()
    while True:
        message = next_message(session.world, repl.poll)
        if "quit" in message:
            break
        [completion] = complete(session, [Request.from_json(message["request"])], repl.on_token if on_rank_0 else None)
        if on_rank_0:
            repl.finish(completion)
    if on_rank_0 and interactive:
        note("")
    leave(session.world)
    return output.exit_code
