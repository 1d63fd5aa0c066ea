"""`generate`: prompts in, completions out. Rank 0 reads and writes; all ranks get the same requests."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from llama_dist.engine.session import Checked, Session, check_run, complete, open_session
from llama_dist.errors import ConfigError, RequestError
from llama_dist.frontend.inbox import POLL_SECONDS, next_message
from llama_dist.frontend.lines import LineReader
from llama_dist.frontend.options import GenerateOptions
from llama_dist.frontend.output import Output, note
from llama_dist.frontend.prompts import parse_prompts, read_prompts_file
from llama_dist.parallel.launch import read_launch
from llama_dist.parallel.world import leave
from llama_dist.request import Completion, Request, TokenEvent
from llama_dist.text.base import Tokenizer
from llama_dist.text.chat import encode_dialog, pick_chat_format
from llama_dist.text.stream import TextStream

Encode = Callable[[str], list[int]]


def prepare(options: GenerateOptions) -> Callable[[], int]:
    """Check flags, checkpoint and prompts file; the work comes back. Raises ConfigError or CheckpointError."""
    prompts = list(options.prompt)
    # Only rank 0 needs the file, but its neighbours can see too that it is missing, and end with it.
    if options.prompts_file not in (None, "-") and read_launch().rank == read_launch().local_rank:
        prompts = read_prompts_file(str(options.prompts_file))
    checked = check_run(options.run)
    encode = encoder(options, checked)
    return lambda: run(options, checked, prompts, encode)


def encoder(options: GenerateOptions, checked: Checked) -> Encode:
    """How a prompt becomes ids: as text to go on with, or as a user's message in the chat format."""
    tokenizer = checked.tokenizer
    if not options.chat:
        return lambda prompt: tokenizer.encode(prompt, bos=tokenizer.add_bos, eos=False)
    style = pick_chat_format(tokenizer, checked.reader.config.family, options.run.chat_format)
    return lambda prompt: encode_dialog(tokenizer, [{"role": "user", "content": prompt}], style)


def make_requests(
    prompts: Sequence[str], encode: Encode, options: GenerateOptions, validate: Callable[[Request], None]
) -> list[Request]:
    """One checked request a prompt. RequestError naming the number of the first prompt that cannot be served."""
    requests = []
    for n, prompt in enumerate(prompts):
        try:
            if not prompt:
                raise RequestError("the prompt is empty, must have some text", "prompt")
            request = Request(str(n), tuple(encode(prompt)), options.sampling)
            validate(request)
        except RequestError as err:
            raise RequestError(f"prompt {n + 1} of {len(prompts)}: {err}", err.field) from None
        requests.append(request)
    return requests


def run(options: GenerateOptions, checked: Checked, prompts: list[str], encode: Encode) -> int:
    """Load, share the requests, complete them, write the answers. Every rank calls it alike."""
    session = open_session(options.run, checked)
    reader = LineReader(sys.stdin.fileno()) if options.prompts_file == "-" and session.world.rank == 0 else None
    lines: list[str] = []

    def poll() -> dict[str, Any] | None:
        """On rank 0: all requests, or what is wrong with them; None while stdin goes on."""
        if reader is not None and not reader.ended:
            line = reader.poll(POLL_SECONDS)
            if line is not None:
                lines.append(line)
            return None
        try:
            prompts[:] = parse_prompts(lines, "-") if reader is not None else prompts
            requests = make_requests(prompts, encode, options, session.engine.validate)
        except (RequestError, ConfigError) as err:
            return {"error": str(err), "field": getattr(err, "field", None)}
        return {"requests": [request.to_json() for request in requests]}

    message = next_message(session.world, poll)
    if "error" in message:
        raise RequestError(message["error"], message["field"])
    requests = [Request.from_json(data) for data in message["requests"]]
    output = Output()
    streaming = len(requests) == 1 and not options.json and sys.stdout.isatty()
    stream = Stream(session.tokenizer, output) if streaming and session.world.rank == 0 else None
    began = time.monotonic()
    if stream is not None and options.sampling.echo:
        stream.push(*requests[0].prompt)
    completions = complete(session, requests, stream.on_token if stream is not None else None)
    seconds = time.monotonic() - began
    if session.world.rank == 0:
        if stream is not None:
            stream.finish()
        else:
            write(session, options, prompts, completions, output)
        note(summary(requests, completions, seconds))
    leave(session.world)
    return output.exit_code


class Stream:
    """An answer written as it is drawn, for a human who waits; ends with a line's end."""

    def __init__(self, tokenizer: Tokenizer, output: Output) -> None:
        self._text, self._output = TextStream(tokenizer), output

    def push(self, *ids: int) -> None:
        self._output.write("".join(self._text.push(i) for i in ids))

    def on_token(self, event: TokenEvent) -> None:
        self.push(event.token_id)

    def finish(self) -> None:
        self._output.write(self._text.finish() + "\n")


def write(
    session: Session,
    options: GenerateOptions,
    prompts: Sequence[str],
    completions: Sequence[Completion],
    output: Output,
) -> None:
    """All answers in order: JSON lines, or texts under their prompts."""
    for n, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        text = session.tokenizer.decode(list(completion.token_ids))
        if options.json:
            record = {
                "prompt": prompt,
                "text": text,
                "token_ids": completion.token_ids,
                "logprobs": completion.logprobs,
                "finish_reason": completion.finish_reason,
            }
            output.write(json.dumps(record, ensure_ascii=False) + "\n")
            continue
        if n:
            output.write("\n")
        if len(prompts) > 1:
            note("> " + prompt.replace("\n", "\n> "))
        output.write(text + "\n")


def summary(requests: Sequence[Request], completions: Sequence[Completion], seconds: float) -> str:
    """How much was done and how fast, in one line."""
    read = sum(len(r.prompt) for r in requests)
    new = sum(
        len(c.token_ids) - (len(r.prompt) if r.params.echo else 0) for r, c in zip(requests, completions, strict=True)
    )
    rate = new / seconds if seconds > 0 else 0.0
    many = "" if len(requests) == 1 else "s"
    return (
        f"{len(requests)} prompt{many}, {read} prompt tokens, {new} new tokens in {seconds:.1f} s ({rate:.1f} tokens/s)"
    )
