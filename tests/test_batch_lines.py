"""The batch format: every field and every bad value of a line, and the shapes of results. No model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from llama_dist.frontend.batch.fields import bad_words
from llama_dist.frontend.batch.lines import (
    MAX_LINE,
    Line,
    LineError,
    custom_id_of,
    numbered_lines,
    parse_line,
    requests_of,
)
from llama_dist.frontend.batch.prompts import Encoder
from llama_dist.frontend.batch.results import Names, failure, success
from llama_dist.request import Completion, SamplingParams
from llama_dist.text.chat import encode_dialog
from llama_dist.text.load import load_tokenizer
from tests import tiny_tokenizer

VOCAB = tiny_tokenizer.N_WORDS
NAMES = Names("0123456789abcdef", "tiny")


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Encoder:
    folder = tmp_path_factory.mktemp("tokenizer")
    tiny_tokenizer.save_hf(folder)
    return Encoder(load_tokenizer(folder), VOCAB, 40, "chatml")


def line(encoder: Encoder, number: int = 7, **data: Any) -> Line:
    return parse_line(json.dumps(data).encode(), number, encoder)


def params(encoder: Encoder, **fields: Any) -> SamplingParams:
    return line(encoder, prompt="hello", **fields).settings.params


def chat_params(encoder: Encoder, **fields: Any) -> SamplingParams:
    return line(encoder, messages=[{"role": "user", "content": "hi"}], **fields).settings.params


def refused(encoder: Encoder, raw: bytes | dict[str, Any]) -> tuple[str, str]:
    with pytest.raises(LineError) as caught:
        parse_line(raw if isinstance(raw, bytes) else json.dumps(raw).encode(), 7, encoder)
    assert "\n" not in str(caught.value)
    return caught.value.code, str(caught.value)


def test_openai_line_and_bare_line_ask_for_the_same(encoder: Encoder) -> None:
    body = {"prompt": "hello the", "max_tokens": 3, "seed": 5}
    full = line(encoder, custom_id="a", method="POST", url="/v1/completions", body=body)
    assert full == line(encoder, custom_id="a", **body)
    assert full.prompt == (tiny_tokenizer.BOS, *encoder.tokenizer.encode("hello the", bos=False, eos=False))
    assert not full.chat and full.number == 7
    assert line(encoder, prompt="x").custom_id == "line-7"


def test_chat_line(encoder: Encoder) -> None:
    messages = [
        {"role": "developer", "content": "be kind"},
        {"role": "user", "content": [{"type": "text", "text": "hi"}]},
    ]
    full = line(encoder, custom_id="a", method="POST", url="/v1/chat/completions", body={"messages": messages})
    plain = [{"role": "system", "content": "be kind"}, {"role": "user", "content": "hi"}]
    assert full.chat and full.prompt == tuple(encode_dialog(encoder.tokenizer, plain, "chatml"))  # type: ignore[arg-type]
    assert full == line(encoder, custom_id="a", messages=messages)


def test_prompts_of_ids_and_without_bos(encoder: Encoder) -> None:
    assert line(encoder, prompt=[5, 0, 292]).prompt == (5, 0, 292)
    assert line(encoder, prompt="hello", add_special_tokens=False).prompt[0] != tiny_tokenizer.BOS


def test_defaults_are_openais(encoder: Encoder) -> None:
    assert params(encoder) == SamplingParams(temperature=1.0, top_p=1.0, max_tokens=16)
    assert chat_params(encoder) == SamplingParams(temperature=1.0, top_p=1.0, max_tokens=None)
    assert params(encoder, temperature=None, stop=None, n=None, user="u", metadata={"a": 1}, stream=False) == params(
        encoder
    )


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ({"temperature": 0}, {"temperature": 0.0}),
        ({"temperature": 1.5, "top_p": 0.3, "min_p": 0.1}, {"temperature": 1.5, "top_p": 0.3, "min_p": 0.1}),
        ({"top_k": -1}, {"top_k": 0}),
        ({"top_k": 7}, {"top_k": 7}),
        ({"max_tokens": 0}, {"max_tokens": 0}),
        ({"max_tokens": 9, "min_tokens": 4}, {"max_tokens": 9, "min_tokens": 4}),
        ({"presence_penalty": -1, "frequency_penalty": 0.5}, {"presence_penalty": -1.0, "frequency_penalty": 0.5}),
        ({"repetition_penalty": 1.25}, {"repetition_penalty": 1.25}),
        ({"logit_bias": {"17": -100, "4": 2.5}}, {"logit_bias": ((4, 2.5), (17, -100.0))}),
        ({"seed": 12}, {"seed": 12}),
        ({"stop": "x"}, {"stop": ("x",)}),
        ({"stop": ["x", "yz"]}, {"stop": ("x", "yz")}),
        ({"stop_token_ids": [3, 4], "ignore_eos": True}, {"stop_token_ids": (3, 4), "ignore_eos": True}),
        ({"allowed_token_ids": [9, 8]}, {"allowed_token_ids": (9, 8)}),
        ({"echo": True, "logprobs": 0}, {"echo": True, "logprobs": True}),
        ({"logprobs": 5}, {"logprobs": True, "top_logprobs": 5}),
        ({"prompt_logprobs": 0}, {"prompt_logprobs": True}),
        ({"prompt_logprobs": False}, {}),
    ],
)
def test_fields_become_sampling_params(encoder: Encoder, given: dict[str, Any], wanted: dict[str, Any]) -> None:
    assert params(encoder, **given) == SamplingParams(**{"temperature": 1.0, "top_p": 1.0, "max_tokens": 16, **wanted})


def test_fields_of_chats_alone(encoder: Encoder) -> None:
    found = chat_params(encoder, logprobs=True, top_logprobs=3, max_completion_tokens=5)
    assert (found.logprobs, found.top_logprobs, found.max_tokens) == (True, 3, 5)
    assert chat_params(encoder, max_tokens=5, max_completion_tokens=5).max_tokens == 5
    assert chat_params(encoder, logprobs=False) == chat_params(encoder)


def test_bad_words_count_with_and_without_a_space(encoder: Encoder) -> None:
    tokenizer = encoder.tokenizer
    the, spaced = (tuple(tokenizer.encode(text, bos=False, eos=False)) for text in ("the", " the"))
    assert bad_words(("the",), tokenizer) == (the,)  # "the" is two tokens, " the" is one: another word
    assert len(spaced) == 1 and len(the) == 2
    assert set(bad_words(("a",), tokenizer)) == {
        tuple(tokenizer.encode("a", bos=False, eos=False)),
        tuple(tokenizer.encode(" a", bos=False, eos=False)),
    }
    assert params(encoder, bad_words=["a"]).bad_words == bad_words(("a",), tokenizer)


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("temperature", -0.1, "0 or more"),
        ("temperature", "1", "a number"),
        ("temperature", True, "a number"),
        ("temperature", 10**400, "finite"),
        ("top_p", 1.01, "from 0 to 1"),
        ("top_k", -2, "-1 or more"),
        ("top_k", 1.5, "whole number"),
        ("min_p", 2, "from 0 to 1"),
        ("max_tokens", -1, "0 or more"),
        ("max_tokens", "9", "whole number"),
        ("min_tokens", 17, "at most max_tokens 16"),
        ("presence_penalty", 2.5, "from -2 to 2"),
        ("frequency_penalty", -3, "from -2 to 2"),
        ("repetition_penalty", 0, "from 0.01 to 10"),
        ("logit_bias", {"x": 1}, "token id"),
        ("logit_bias", {"293": 1}, "token id"),
        ("logit_bias", {"3": 101}, "from -100 to 100"),
        ("logit_bias", [], "object"),
        ("seed", -1, "from 0 to"),
        ("seed", 2**63, "from 0 to"),
        ("stop", "", "none of them empty"),
        ("stop", [1], "list of texts"),
        ("stop", ["a"] * 17, "at most 16"),
        ("stop_token_ids", [293], "from 0 to 292"),
        ("stop_token_ids", [True], "from 0 to 292"),
        ("allowed_token_ids", [], "at least one"),
        ("bad_words", ["  "], "blanks"),
        ("bad_words", "a", "list of texts"),
        ("ignore_eos", 1, "true or false"),
        ("echo", "yes", "true or false"),
        ("logprobs", 21, "from 0 to 20"),
        ("logprobs", True, "whole number"),
        ("prompt_logprobs", 2, "alternatives"),
        ("n", 0, "from 1 to 128"),
        ("best_of", 2, "as large as n"),
        ("stream", True, "false"),
        ("model", 3, "a text"),
        ("return_token_ids", "x", "true or false"),
        ("prompt", {"a": 1}, "a text or a list of token ids"),
        ("prompt", [5, 293], "from 0 to 292"),
        ("prompt", [], "at least 1 token"),
        ("prompt", ["a", "b"], "several prompts"),
        ("prompt", [[1], [2]], "several prompts"),
        ("temprature", 1, "did you mean temperature"),
        ("response_format", {"type": "json_object"}, "no known field"),
        ("messages", [], "give one of them"),
        ("top_logprobs", 2, "no field of a completion"),
    ],
)
def test_bad_values_name_their_field(encoder: Encoder, field: str, value: Any, words: str) -> None:
    code, message = refused(encoder, {"prompt": "hello", field: value})
    assert code == "invalid_request" and field in message and words in message, message


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"messages": [{"role": "king", "content": "x"}]}, "role 'king'"),
        ({"messages": []}, "no messages"),
        ({"messages": "x"}, "list of objects"),
        ({"messages": [3]}, "messages[0]"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "no text"),
        ({"messages": [{"role": "user", "content": 3}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": "x", "tool_calls": []}]}, "tool_calls"),
        ({"messages": [{"role": "user", "content": "x"}], "top_logprobs": 3}, "unless logprobs"),
        ({"messages": [{"role": "user", "content": "x"}], "echo": True}, "no field of a chat"),
        ({"messages": [{"role": "user", "content": "x"}], "max_tokens": 3, "max_completion_tokens": 4}, "the same"),
        ({"body": {"prompt": "x"}}, "url"),
        ({"url": "/v1/embeddings", "body": {}}, "/v1/embeddings"),
        ({"url": "/v1/completions", "body": [1]}, "body"),
        ({"url": "/v1/completions", "body": {"messages": [{"role": "user", "content": "x"}]}}, "prompt is missing"),
        ({"url": "/v1/chat/completions", "body": {"prompt": "x"}}, "messages is missing"),
        ({"url": "/v1/completions", "method": "GET", "body": {"prompt": "x"}}, "method"),
        ({"url": "/v1/completions", "body": {"prompt": "x"}, "extra": 1}, "'extra'"),
        ({"custom_id": 5, "prompt": "x"}, "custom_id"),
        ({"custom_id": "", "prompt": "x"}, "custom_id"),
        ({}, "a prompt or messages"),
    ],
)
def test_bad_lines_say_what_is_wrong(encoder: Encoder, fields: dict[str, Any], words: str) -> None:
    code, message = refused(encoder, fields)
    assert code == "invalid_request" and words in message, message


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (b"nonsense", "no JSON"),
        (b'{"prompt": "x"', "no JSON"),
        (b'{"prompt": NaN}', "NaN"),
        (b"[1]", "a JSON list"),
        (b'"x"', "a JSON text"),
        (b'{"prompt": "\xff"}', "UTF-8 text at its byte 12"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"prompt": ' + b"9" * 5000 + b"}", "no JSON"),
    ],
)
def test_what_is_no_json_object(encoder: Encoder, raw: bytes, words: str) -> None:
    code, message = refused(encoder, raw)
    assert code == "invalid_json_line" and words in message, message


def test_too_long_prompts_have_their_own_code(encoder: Encoder) -> None:
    code, message = refused(encoder, {"prompt": [5] * 41})
    assert code == "context_length_exceeded" and "41 tokens" in message and "40" in message
    assert len(line(encoder, prompt=[5] * 40).prompt) == 40


def test_a_checkpoint_without_chat_format_still_completes(encoder: Encoder) -> None:
    bare = Encoder(encoder.tokenizer, VOCAB, 40, None, "no chat format fits")
    assert line(bare, prompt="x").prompt
    assert refused(bare, {"messages": [{"role": "user", "content": "x"}]}) == ("invalid_request", "no chat format fits")


@pytest.mark.parametrize(
    ("raw", "wanted"),
    [
        (b'{"custom_id": "a", "prompt": "x"}', "a"),
        (b' { "custom_id" : "a\xc3\xa9" }', "a\u00e9"),
        (b'{"prompt": "x", "custom_id": "b"}', "b"),
        (b'{"custom_id": "a\\"b", "prompt": "x"}', 'a"b'),
        (b'{"prompt": "x"}', "line-7"),
        (b'{"custom_id": "a", "custom_id": "b"}', "b"),
        (b'{"body": {"custom_id": "no"}}', "line-7"),
        (b'{"custom\\u005fid": "u", "prompt": "x"}', "u"),
        (b'{"custom_id": "a", broken', "a"),
        (b'{"custom_id": 5}', "line-7"),
        (b"nonsense custom_id", "line-7"),
    ],
)
def test_custom_ids_are_found_without_parsing(encoder: Encoder, raw: bytes, wanted: str) -> None:
    assert custom_id_of(raw, 7) == wanted


def test_answers_have_their_own_seeds(encoder: Encoder) -> None:
    three = requests_of(line(encoder, custom_id="a", prompt="x", n=3, seed=9), 1)
    assert [r.id for r in three] == ["7.0", "7.1", "7.2"]
    assert three[0].params.seed == 9 and len({r.params.seed for r in three}) == 3
    moved = requests_of(line(encoder, 8, custom_id="a", prompt="x"), 1)[0].params.seed
    assert moved == requests_of(line(encoder, 7, custom_id="a", prompt="x"), 1)[0].params.seed
    assert moved != requests_of(line(encoder, 7, custom_id="b", prompt="x"), 1)[0].params.seed
    assert moved != requests_of(line(encoder, 7, custom_id="a", prompt="x"), 2)[0].params.seed


def answered(encoder: Encoder, fields: dict[str, Any], *completions: Completion) -> dict[str, Any]:
    record = json.loads(success(NAMES, line(encoder, custom_id="a", **fields), completions, encoder.tokenizer))
    assert list(record) == ["id", "custom_id", "response", "error"] and record["error"] is None
    assert record["id"] == "batch_req_0123456789abcdef_7" and record["custom_id"] == "a"
    assert record["response"]["status_code"] == 200 and record["response"]["request_id"] == "req_0123456789abcdef_7"
    body: dict[str, Any] = record["response"]["body"]
    return body


def ids(encoder: Encoder, text: str) -> tuple[int, ...]:
    return tuple(encoder.tokenizer.encode(text, bos=False, eos=False))


def test_a_completion(encoder: Encoder) -> None:
    new = ids(encoder, " the end")
    body = answered(encoder, {"prompt": "x", "return_token_ids": True}, Completion("7.0", new, None, "stop"))
    assert body == {
        "id": "cmpl-0123456789abcdef-7",
        "object": "text_completion",
        "created": 7,
        "model": "tiny",
        "choices": [
            {
                "index": 0,
                "text": " the end",
                "logprobs": None,
                "finish_reason": "stop",
                "token_ids": list(new),
                "prompt_token_ids": [tiny_tokenizer.BOS, *ids(encoder, "x")],
            }
        ],
        "usage": {"prompt_tokens": 2, "completion_tokens": len(new), "total_tokens": 2 + len(new)},
    }


def test_echo_with_logprobs_and_a_stop_string(encoder: Encoder) -> None:
    prompt, new = (tiny_tokenizer.BOS, *ids(encoder, "a")), ids(encoder, "bcd")
    tops = ((), ((9, -0.5),), *(((i, -1.0), (5, -2.0)) for i in new))
    done = Completion("7.0", prompt + new, (0.0, -3.0, -1.0, -1.0, float("-inf")), "stop", tops, None, 2)
    body = answered(encoder, {"prompt": "a", "echo": True, "logprobs": 2}, done)
    (choice,) = body["choices"]
    assert choice["text"] == "abc" and body["usage"]["completion_tokens"] == 3
    assert choice["logprobs"]["tokens"] == ["<s>", "a", "b", "c", "d"]
    assert choice["logprobs"]["token_logprobs"] == [None, -3.0, -1.0, -1.0, -9999.0]
    assert choice["logprobs"]["text_offset"] == [0, 0, 1, 2, 3]
    assert choice["logprobs"]["top_logprobs"][0] is None
    assert choice["logprobs"]["top_logprobs"][1] == {encoder.tokenizer.decode([9]): -0.5, "a": -3.0}


def test_a_chat_answer_with_logprobs_and_two_choices(encoder: Encoder) -> None:
    smile = ids(encoder, "\U0001f642")
    first = Completion("7.0", smile, (-1.0,) * 4, "stop", (((smile[0], -1.0),), (), (), ()))
    second = Completion("7.1", ids(encoder, "h"), (-2.0,), "length", ((),))
    fields = {
        "messages": [{"role": "user", "content": "x"}],
        "n": 2,
        "logprobs": True,
        "top_logprobs": 1,
        "model": "mine",
    }
    body = answered(encoder, fields, first, second)
    assert body["object"] == "chat.completion" and body["id"].startswith("chatcmpl-") and body["model"] == "mine"
    one, two = body["choices"]
    assert one["message"] == {"role": "assistant", "content": "\U0001f642", "refusal": None}
    assert [c["bytes"] for c in one["logprobs"]["content"]] == [[b] for b in "\U0001f642".encode()]
    assert one["logprobs"]["content"][0]["token"] == "bytes:\\xf0"
    assert one["logprobs"]["content"][0]["top_logprobs"] == [{"token": "bytes:\\xf0", "logprob": -1.0, "bytes": [0xF0]}]
    assert (two["index"], two["message"]["content"], two["finish_reason"]) == (1, "h", "length")
    assert body["usage"]["completion_tokens"] == 5


def test_prompt_logprobs(encoder: Encoder) -> None:
    done = Completion("7.0", ids(encoder, "b"), None, "length", None, (0.0, -2.5))
    (choice,) = answered(encoder, {"prompt": [5, 6], "prompt_logprobs": 0}, done)["choices"]
    assert choice["prompt_logprobs"] == [None, {"6": {"logprob": -2.5, "decoded_token": encoder.tokenizer.decode([6])}}]


def test_an_error_record_has_its_line_number() -> None:
    raw = failure(NAMES, 12, 'a\u2028"b\ud800', "invalid_request", "no")
    assert raw.endswith(b"\n") and raw.isascii() and len(raw.splitlines()) == 1
    record = json.loads(raw)
    assert record["response"] is None and record["custom_id"] == 'a\u2028"b\ud800'
    assert record["error"] == {"code": "invalid_request", "message": "line 12: no"}


def test_a_line_beyond_all_bounds_takes_bounded_memory(encoder: Encoder, tmp_path: Path) -> None:
    path = tmp_path / "in"
    with path.open("wb") as file:
        file.write(b'{"prompt": "x"}\n')
        file.truncate(MAX_LINE + 10_000)
        file.seek(0, 2)
        file.write(b'\n{"prompt": "y"}')
    with path.open("rb") as file:
        lines = list(numbered_lines(file.readline))
    assert [n for n, _ in lines] == [1, 2, 3] and len(lines[1][1]) == MAX_LINE + 1
    assert "bytes" in refused(encoder, lines[1][1])[1]
    assert parse_line(lines[2][1], 3, encoder).prompt[1:] == ids(encoder, "y")
