"""One line of the input: OpenAI's batch form, or a bare prompt, as a prompt of token ids with its settings."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, NoReturn

from llama_dist.engine.sampler import derive_seed
from llama_dist.errors import RequestError
from llama_dist.frontend.batch import values
from llama_dist.frontend.batch.fields import Settings, read_settings
from llama_dist.frontend.batch.prompts import Encoder
from llama_dist.request import Request

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
MAX_LINE = 64 * 2**20
"""Bytes of a line worth reading: beyond any prompt a model can take."""

_ID_FIRST = re.compile(rb'\s*\{\s*"custom_id"\s*:\s*"([^"\\\x00-\x1f]+)"\s*[,}]')
_ESCAPED = re.compile(rb"\\u00[2-7]")  # of a character that the key might be spelled with
_ENVELOPE = ("custom_id", "method", "url", "body")


class LineError(Exception):
    """A line that gets an error record. `code` is for programs, the message for people."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


@dataclass(frozen=True)
class Line:
    """A request of the input: `number` counts lines from 1, and makes the ids of the `n` requests to the engine."""

    number: int
    custom_id: str
    chat: bool
    prompt: tuple[int, ...]
    settings: Settings


def default_id(number: int) -> str:
    """The custom_id of a line that has none."""
    return f"line-{number}"


def requests_of(line: Line, run_seed: int) -> list[Request]:
    """One request to the engine for each answer, its id `NUMBER.INDEX`.

    The first answer's seed is the line's own, or made from the run's seed and the custom_id; the others' are made from
    the first's. The line's place in the file plays no part.
    """
    params = line.settings.params
    first = derive_seed(run_seed, line.custom_id) if params.seed is None else params.seed
    seeds = [first, *(derive_seed(first, str(k)) for k in range(1, line.settings.n))]
    return [Request(f"{line.number}.{k}", line.prompt, replace(params, seed=seed)) for k, seed in enumerate(seeds)]


def custom_id_of(raw: bytes, number: int) -> str:
    """The custom_id of a line, read as cheaply as can be; its default where it has none that can be read.

    Most files have it first and once, so that no JSON needs parsing.
    """
    found = _ID_FIRST.match(raw)
    again = raw.find(b"custom_id", found.end() if found else 0)
    if again < 0 and not (b"\\u00" in raw and _ESCAPED.search(raw)):
        return found[1].decode("utf-8", "replace") if found else default_id(number)
    try:
        data = _parse(raw)
    except LineError:
        return found[1].decode("utf-8", "replace") if found else default_id(number)
    custom_id = data.get("custom_id")
    return custom_id if isinstance(custom_id, str) and custom_id else default_id(number)


def _parse(raw: bytes) -> dict[str, Any]:
    def no_constant(text: str) -> NoReturn:
        raise ValueError(f"{text} is not JSON")

    if len(raw) > MAX_LINE:
        raise LineError("invalid_json_line", f"the line has more than {MAX_LINE} bytes")
    try:
        data = json.loads(raw.decode("utf-8-sig"), parse_constant=no_constant)
    except UnicodeDecodeError as err:
        raise LineError("invalid_json_line", f"the line is no UTF-8 text at its byte {err.start}") from None
    except RecursionError:
        raise LineError("invalid_json_line", "the line is no usable JSON: nested too deeply") from None
    except ValueError as err:
        raise LineError("invalid_json_line", f"the line is no JSON: {' '.join(str(err).split())[:120]}") from None
    if not isinstance(data, dict):
        raise LineError("invalid_json_line", f"the line is a JSON {_kind(data)}, must be an object")
    return data


def _kind(value: Any) -> str:
    return {str: "text", list: "list", bool: "truth value", type(None): "null"}.get(type(value), "number")


def parse_line(raw: bytes, number: int, encoder: Encoder) -> Line:
    """The request in line `number`. LineError for whatever cannot be served; its message names the field."""
    data = _parse(raw)
    try:
        custom_id = data.get("custom_id", default_id(number))
        if not isinstance(custom_id, str) or not custom_id:
            raise values.wrong("custom_id", custom_id, "a text that is not empty")
        chat, body = _request(data)
        settings = read_settings(body, chat, encoder.tokenizer, encoder.vocab_size)
        if chat:
            prompt = encoder.dialog(body["messages"])
        else:
            prompt = encoder.prompt(body["prompt"], settings.add_special_tokens)
        encoder.check_length(prompt)
    except RequestError as err:
        too_long = err.field == "prompt_length"
        raise LineError("context_length_exceeded" if too_long else "invalid_request", str(err)) from None
    return Line(number, custom_id, chat, prompt, settings)


def _request(data: Mapping[str, Any]) -> tuple[bool, Mapping[str, Any]]:
    """Whether it is a chat, and its body."""
    if "body" not in data and "url" not in data and "method" not in data:
        body: Any = {name: value for name, value in data.items() if name != "custom_id"}
    else:
        for name in data:
            if name not in _ENVELOPE:
                raise RequestError(f"{name[:60]!r} is no field of a batch line; it has {', '.join(_ENVELOPE)}", name)
        if data.get("method", "POST") != "POST":
            raise values.wrong("method", data["method"], "POST")
        if data.get("url") not in (COMPLETIONS, CHAT):
            raise values.wrong("url", data.get("url"), f"{COMPLETIONS} or {CHAT}")
        body = data.get("body")
        if not isinstance(body, dict):
            raise values.wrong("body", body, "an object")
    has_prompt, has_messages = body.get("prompt") is not None, body.get("messages") is not None
    if has_prompt and has_messages:
        raise RequestError("there is a prompt and there are messages; give one of them", "prompt")
    chat = data["url"] == CHAT if "url" in data else has_messages
    needed = "messages" if chat else "prompt"
    if not (has_messages if chat else has_prompt):
        what = "a prompt or messages" if "url" not in data else needed
        raise RequestError(f"{needed} is missing; the request needs {what}", needed)
    return chat, body


def numbered_lines(read: Callable[[int], bytes], first: int = 1) -> Iterator[tuple[int, bytes]]:
    """(number, bytes) of the lines that `read(size)` returns one after another, `readline` of a file.

    Of a line beyond MAX_LINE comes only the beginning, so that no line can take all memory; it is refused later.
    """
    number = first
    while raw := read(MAX_LINE + 1):
        part = raw
        while len(part) > MAX_LINE and not part.endswith(b"\n"):
            part = read(MAX_LINE + 1)
        yield number, raw
        number += 1
