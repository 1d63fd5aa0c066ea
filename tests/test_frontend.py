"""What rank 0 does beside the engine: lines, prompts, histories, the REPL; and a human slower than any timeout."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import resource
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama_dist.config import RunConfig
from llama_dist.engine.session import read_tokenizer
from llama_dist.errors import ConfigError, RequestError
from llama_dist.frontend import generate
from llama_dist.frontend.chat import Repl
from llama_dist.frontend.conversation import Conversation, answer_room
from llama_dist.frontend.lines import LineReader
from llama_dist.frontend.options import GenerateOptions
from llama_dist.frontend.output import PIPE_CLOSED, Output
from llama_dist.frontend.prompts import parse_prompts
from llama_dist.request import Completion, Request, SamplingParams, TokenEvent
from llama_dist.text.base import Tokenizer
from llama_dist.text.chat import Dialog, encode_dialog
from tests.conftest import Saver
from tests.tiny_tokenizer import IM_END

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def tokenizer(checkpoint: Saver) -> Tokenizer:
    from llama_dist.checkpoint.open import open_checkpoint

    folder = checkpoint("llama-gqa", "hf")
    return read_tokenizer(RunConfig(str(folder)), open_checkpoint(folder))


# ---- lines


@given(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\r")), st.data())
def test_lines_are_the_same_however_they_come(text: str, data: st.DataObject) -> None:
    read, write = os.pipe()
    with open(read, "rb", 0), open(write, "wb", 0) as source:
        reader, lines, rest = LineReader(read), [], text.encode()
        while rest:
            n = data.draw(st.integers(1, len(rest)))
            source.write(rest[:n])
            rest = rest[n:]
            while (line := reader.poll(0)) is not None:
                lines.append(line)
            assert not reader.ended
        source.close()
        while not reader.ended:
            if (line := reader.poll(0)) is not None:
                lines.append(line)
    assert lines == (text.removesuffix("\n").split("\n") if text else [])


def test_lines_come_from_a_descriptor_of_any_number() -> None:
    """`select.select` takes those below 1024 only."""
    if resource.getrlimit(resource.RLIMIT_NOFILE)[0] <= 2000:
        pytest.skip("no descriptor of that number may be opened")
    read, write = os.pipe()
    high = fcntl.fcntl(read, fcntl.F_DUPFD, 2000)
    reader = LineReader(high)
    assert reader.poll(0) is None
    os.write(write, b"one\n")
    assert reader.poll(5) == "one"
    for fd in (read, write, high):
        os.close(fd)


def test_waiting_for_a_line_ends_in_time() -> None:
    read, write = os.pipe()
    reader, began = LineReader(read), time.monotonic()
    assert reader.poll(0.2) is None and not reader.ended
    assert 0.15 < time.monotonic() - began < 5
    os.write(write, b"a\r\nb\xff")
    assert reader.poll(5) == "a"
    os.close(write)
    assert [reader.poll(0), reader.poll(0)] == ["b\ufffd", None]
    assert reader.ended
    os.close(read)


# ---- prompts


@pytest.mark.parametrize(
    ("lines", "prompts"),
    [
        (["a", "", "  b "], ["a", "  b "]),
        (['{"prompt": "a"}', " ", '{"prompt": "", "id": 3}'], ["a", ""]),
        (["{not json", '{"prompt": "a"}'], ["{not json", '{"prompt": "a"}']),
        (["a", '{"prompt": "b"}'], ["a", '{"prompt": "b"}']),
        (["[1]", "5"], ["[1]", "5"]),
    ],
)
def test_prompts_of_lines(lines: list[str], prompts: list[str]) -> None:
    assert parse_prompts(lines, "f") == prompts


def test_json_lines_are_all_json() -> None:
    with pytest.raises(ConfigError, match="line 3: must be a JSON object"):
        parse_prompts(['{"prompt": "a"}', "", '{"text": "b"}'], "f")


def test_requests_keep_order_and_an_unservable_prompt_is_named() -> None:
    options = GenerateOptions(RunConfig("x"), SamplingParams(echo=True), ("a",))

    def validate(request: Request) -> None:
        if len(request.prompt) > 3:
            raise RequestError("the prompt has too many tokens", "prompt")

    def encode(prompt: str) -> list[int]:
        return [ord(c) for c in prompt]

    made = generate.make_requests(["ab", "c"], encode, options, validate)
    assert [(r.id, r.prompt, r.params.echo) for r in made] == [("0", (97, 98), True), ("1", (99,), True)]
    for prompts, part in ((["a", ""], "prompt 2 of 2: the prompt is empty"), (["abcd"], "prompt 1 of 1: .* too many")):
        with pytest.raises(RequestError, match=part) as caught:
            generate.make_requests(prompts, encode, options, validate)
        assert caught.value.field == "prompt"


def test_the_summary_does_not_count_an_echoed_prompt_as_new() -> None:
    requests = [Request("0", (1, 2, 3), SamplingParams(echo=True)), Request("1", (4,))]
    done = [Completion("0", (1, 2, 3, 9, 9), None, "stop"), Completion("1", (7, 8), None, "length")]
    text = generate.summary(requests, done, 2.0)
    assert text == "2 prompts, 4 prompt tokens, 4 new tokens in 2.0 s (2.0 tokens/s)"


def test_output_goes_quiet_when_its_reader_has_gone() -> None:
    code = (
        "from llama_dist.frontend.output import Output\nimport sys\nout = Output()\nout.write('first\\n')\n"
        "sys.stdin.read()\nfor _ in range(9): out.write('more\\n')\nraise SystemExit(out.exit_code)"
    )
    pipe = subprocess.PIPE
    process = subprocess.Popen([sys.executable, "-c", code], stdin=pipe, stdout=pipe, stderr=pipe, cwd=ROOT)
    assert process.stdin is not None and process.stdout is not None and process.stderr is not None
    assert process.stdout.readline() == b"first\n"
    process.stdout.close()
    process.stdin.close()  # which it waits for
    assert (process.wait(30), process.stderr.read()) == (PIPE_CLOSED, b"")


# ---- a conversation


def lengths(dialog: Dialog) -> list[int]:
    """An id a letter: a stand-in for a chat format whose sizes are easy to count."""
    return [ord(c) for message in dialog for c in message["role"][0] + message["content"]]


def test_the_oldest_turns_make_room() -> None:
    talk = Conversation(lengths, 20, "sys")
    assert talk.ask("1234") == (lengths(_dialog("sys", "1234")), 0)
    talk.answered("1234", "a")  # 4 + 5 + 2
    assert talk.ask("56789") == (lengths(_dialog("sys", "1234", "a", "56789")), 0)
    talk.answered("56789", "b")
    ids, dropped = talk.ask("0")
    assert (ids, dropped) == (lengths(_dialog("sys", "56789", "b", "0")), 1)
    assert talk.turns == [("56789", "b")]
    with pytest.raises(RequestError, match="takes 21 tokens with the system prompt, 20 leave room"):
        talk.ask("x" * 16)
    assert talk.turns == [("56789", "b")]
    assert talk.ask("x" * 15)[1] == 1
    talk.reset()
    assert talk.ask("0") == (lengths(_dialog("sys", "0")), 0)


def _dialog(system: str, *turns: str) -> Dialog:
    messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(turns)]
    return [{"role": "system", "content": system}, *messages]  # type: ignore[list-item]


@pytest.mark.parametrize(("length", "asked", "room"), [(4096, None, 1024), (4096, 50, 50), (100, 50, 25), (2, 0, 1)])
def test_room_for_an_answer(length: int, asked: int | None, room: int) -> None:
    assert answer_room(length, asked) == room


class Talk:
    """A Repl on a pipe, with an assistant that says what it is told to."""

    def __init__(self, tokenizer: Tokenizer, max_prompt: int = 120, limit: int = 10**6) -> None:
        read, self.write = os.pipe()
        self.tokenizer = tokenizer
        talk = Conversation(lambda dialog: encode_dialog(tokenizer, dialog, "template"), max_prompt)

        def validate(request: Request) -> None:
            if len(request.prompt) > limit:
                raise RequestError("too long for the engine", "prompt")

        self.repl = Repl(talk, SamplingParams(), validate, tokenizer, LineReader(read), Output(), False)

    def say(self, text: str) -> None:
        os.write(self.write, text.encode())

    def poll(self) -> Request | str | None:
        message = self.repl.poll()
        if message is None:
            return None
        return "quit" if "quit" in message else Request.from_json(json.loads(json.dumps(message["request"])))

    def answer(self, request: Request, text: str) -> None:
        ids = self.tokenizer.encode(text, bos=False, eos=False)
        for i in ids:
            self.repl.on_token(TokenEvent(request.id, i, None))
        self.repl.finish(Completion(request.id, tuple(ids), None, "stop"))


def test_the_repl_streams_remembers_and_forgets(tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]) -> None:
    talk = Talk(tokenizer)
    talk.say("hi\nand you?\n/reset\nwho?\n")
    first = talk.poll()
    assert isinstance(first, Request)
    talk.answer(first, "me \N{GRINNING FACE}")
    assert capsys.readouterr().out == "me \N{GRINNING FACE}\n"
    second = talk.poll()
    assert isinstance(second, Request) and second.id != first.id
    dialog = [("user", "hi"), ("assistant", "me \N{GRINNING FACE}"), ("user", "and you?")]
    expected: Dialog = [{"role": role, "content": text} for role, text in dialog]
    assert list(second.prompt) == encode_dialog(tokenizer, expected, "template")
    talk.answer(second, "fine")
    assert talk.poll() is None
    third = talk.poll()
    assert isinstance(third, Request)
    assert list(third.prompt) == encode_dialog(tokenizer, [{"role": "user", "content": "who?"}], "template")
    os.close(talk.write)
    assert talk.poll() == "quit"


def test_the_repl_refuses_and_goes_on(tokenizer: Tokenizer, capsys: pytest.CaptureFixture[str]) -> None:
    talk = Talk(tokenizer, max_prompt=60, limit=40)
    talk.say("/helo\n" + "x" * 80 + "\n" + "y" * 30 + "\n\n   \n/help\nok\n/quit\nnever\n")
    for part in ("no command /helo; there are /help, /reset, /quit", "refused: the message takes", "too long for the"):
        assert talk.poll() is None
        captured = capsys.readouterr()
        assert part in captured.err and captured.out == ""
    assert [talk.poll(), talk.poll(), talk.poll()] == [None] * 3
    assert "/reset   forget" in capsys.readouterr().err
    request = talk.poll()
    assert isinstance(request, Request)
    assert list(request.prompt) == encode_dialog(tokenizer, [{"role": "user", "content": "ok"}], "template")
    talk.answer(request, "yes")
    assert talk.poll() == "quit"


def test_control_tokens_in_a_message_stay_text(tokenizer: Tokenizer) -> None:
    talk = Talk(tokenizer)
    talk.say("a<|im_end|>b\n")
    request = talk.poll()
    assert isinstance(request, Request)
    assert request.prompt.count(IM_END) == 1  # the template's own


@pytest.mark.spmd
@pytest.mark.slow
def test_a_human_may_take_longer_than_the_timeout(checkpoint: Saver) -> None:
    """Two ranks whose collectives time out after 10 s, a terminal that is silent for 12, then a message and Ctrl-D."""
    ours, theirs = pty.openpty()
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
        "-m",
        "llama_dist",
    ]
    flags = [
        "--ckpt_dir",
        str(checkpoint("llama-gqa", "hf")),
        "--device",
        "cpu",
        "--timeout",
        "10",
        "--max_gen_len",
        "3",
    ]
    process = subprocess.Popen(
        [*command, "chat", *flags],
        stdin=theirs,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    os.close(theirs)
    assert process.stdout is not None and process.stderr is not None
    seen = ""
    while not seen.endswith("> "):
        letter = process.stderr.read(1)
        assert letter, f"ended early: {seen}"
        seen += letter
    assert "type a message, or /help" in seen
    time.sleep(12)
    assert process.poll() is None
    os.write(ours, b"hello\n")
    while (letter := process.stderr.read(1)) not in (">", ""):
        seen += letter
    os.write(ours, b"\x04")
    out, err = process.communicate(timeout=60)
    os.close(ours)
    assert process.returncode == 0, seen + err
    assert out.endswith("\n")
    assert not re.search("error|Traceback", seen + err)
