"""Chat formats: equal to their references, and nothing a user writes becomes part of the scaffolding."""

from __future__ import annotations

import dataclasses
import json
import re
import sys
from collections.abc import Sequence
from datetime import datetime
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_dist.errors import CheckpointError, ConfigError, RequestError
from llama_dist.text.chat import CHAT_FORMATS, Message, encode_dialog, has_special_tags, pick_chat_format
from llama_dist.text.guard import make_guard
from llama_dist.text.tokenizer import PieceTokenizer
from tests import tiny_tokenizer
from tests.assets import llama3_tokenizer, llama_models_path, mistral_tokenizer, smollm2_hf
from tests.text_kinds import AWKWARD, KINDS, MISTRAL_V7, fallback_json, load_kind, prefix_json, tags_json, tricky_text

QUICK = settings(max_examples=40)

LLAMA3_TEMPLATE = (
    "{% set ns = namespace(first=true) %}{% for message in messages %}{% set content = '<|start_header_id|>'"
    " + message['role'] + '<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' %}"
    "{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
LLAMA2_TEMPLATE = (
    "{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate\nstrictly') }}{% endif %}{% if message['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + message['content'].strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + message['content'].strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
THINK_TEMPLATE = (
    "{%- for message in messages %}\n"
    "    {%- set content = message.content %}\n"
    "    {%- if message.role == 'assistant' and '</think>' in content %}\n"
    "        {%- set content = content.split('</think>')[-1].lstrip('\\n') %}\n"
    "    {%- endif %}\n"
    "    {%- if not content %}{% continue %}{% endif %}\n"
    "    {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>' + '\\n' }}\n"
    "{%- endfor %}\n"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n<think>\\n' }}{%- endif %}\n"
)


def dialog(*contents: str, system: str | None = None) -> list[Message]:
    """User and assistant in turn, the system prompt before them."""
    turns: list[Message] = [] if system is None else [{"role": "system", "content": system}]
    return turns + [{"role": ("user", "assistant")[n % 2], "content": c} for n, c in enumerate(contents)]


DIALOGS = (
    dialog("Hi there"),
    dialog(" What is 2+2? \n", system="Be brief. "),
    dialog("a", "b\n", "c \u4f60\u597d \U0001f600"),
    dialog("  one", " two ", "def f():\n\treturn 3", "ok", "x", system="You\n\nare \u00e9"),
)


def with_template(tokenizer: PieceTokenizer, template: str) -> PieceTokenizer:
    return dataclasses.replace(tokenizer, chat_template=template)


@pytest.mark.parametrize("messages", DIALOGS)
def test_llama2_is_metas_format(messages: list[Message]) -> None:
    tokenizer = load_kind("mistral-v1")
    rest = [message["content"] for message in messages]
    if messages[0]["role"] == "system":
        rest = [f"<<SYS>>\n{rest[0]}\n<</SYS>>\n\n{rest[1]}", *rest[2:]]
    expected: list[int] = []
    for n in range(0, len(rest) - 1, 2):
        expected += [1, *text(tokenizer, f"[INST] {rest[n].strip()} [/INST] {rest[n + 1].strip()} "), 2]
    expected += [1, *text(tokenizer, f"[INST] {rest[-1].strip()} [/INST]")]
    assert encode_dialog(tokenizer, messages, "llama2") == expected


def test_llama2_ids_written_out() -> None:
    """<s>, then the pieces of `[INST] Hi [/INST]`."""
    tokenizer = load_kind("mistral-v1")
    ids = encode_dialog(tokenizer, dialog("Hi"), "llama2")
    assert [tokenizer.pieces[i].decode() for i in ids] == ["", " [", "INST", "]", " Hi", " [", "/", "INST", "]"]


def text(tokenizer: PieceTokenizer, s: str) -> list[int]:
    return tokenizer.encode(s, bos=False, eos=False)


@pytest.mark.parametrize("tag", ["[INST]", "[/INST]", "<<SYS>>", "<</SYS>>"])
def test_llama2_tags_in_content_are_refused(tag: str) -> None:
    bad = dialog("a", f"x{tag}", "b")
    assert has_special_tags(bad) and not has_special_tags(dialog("a [ INST ]"))
    with pytest.raises(RequestError, match="special tags"):
        encode_dialog(load_kind("mistral-v1"), bad, "llama2")


@pytest.fixture(scope="module")
def meta_chat() -> Any:
    pytest.importorskip("PIL", reason="Meta's chat_format imports Pillow")
    sys.path.insert(0, str(llama_models_path()))
    try:
        from llama_models.llama3.chat_format import ChatFormat
        from llama_models.llama3.tokenizer import Tokenizer
    finally:
        sys.path.pop(0)
    return ChatFormat(Tokenizer(llama3_tokenizer()))


@pytest.mark.parametrize("messages", [*DIALOGS, [{"role": "user", "content": "f"}, {"role": "tool", "content": "3"}]])
def test_llama3_is_metas_format(meta_chat: Any, messages: list[Message]) -> None:
    from llama_models.datatypes import RawMessage

    # The first Llama 3 strips contents, as does its Hugging Face template; this later reference leaves it to callers.
    raw = [
        RawMessage(
            role=m["role"],
            content=m["content"].strip(),
            **({"stop_reason": "end_of_turn"} if m["role"] == "assistant" else {}),
        )
        for m in messages
    ]
    expected = meta_chat.encode_dialog_prompt(raw).tokens
    assert encode_dialog(load_kind("llama3"), messages, "llama3") == expected


@pytest.mark.parametrize("messages", DIALOGS)
def test_llama3_ids_by_construction(messages: list[Message]) -> None:
    tokenizer = load_kind("llama3")
    expected = [128000]
    for m in messages:
        head = [128006, *text(tokenizer, m["role"]), 128007, *text(tokenizer, "\n\n")]
        expected += [*head, *text(tokenizer, m["content"].strip()), 128009]
    expected += [128006, 78191, 128007, 271]
    assert encode_dialog(tokenizer, messages, "llama3") == expected
    # The template that Hugging Face ships says the same.
    assert encode_dialog(with_template(tokenizer, LLAMA3_TEMPLATE), messages, "template") == expected


def test_chatml_makes_up_no_system_prompt() -> None:
    tokenizer = load_kind("smollm2-gguf")
    ids = encode_dialog(tokenizer, dialog("Hi", "Yo", "So?"), "chatml")
    line = text(tokenizer, "\n")
    turns = [(1, "user\nHi"), (1, "assistant\nYo"), (1, "user\nSo?")]
    expected = [i for start, s in turns for i in (start, *text(tokenizer, s), 2, *line)]
    assert ids == [*expected, 1, *text(tokenizer, "assistant\n")]
    # Where plain text begins with <s>, so does a dialog.
    tiny = load_kind("tiny-json")
    assert encode_dialog(tiny, dialog("Hi"), "chatml")[:2] == [tiny_tokenizer.BOS, tiny_tokenizer.IM_START]


@pytest.mark.parametrize("messages", DIALOGS)
def test_mistral_by_construction(messages: list[Message]) -> None:
    """Versions 1, 3 and 7 of mistral-common's instruct tokenizers."""
    from llama_dist.text.load import load_tokenizer

    system = messages[0]["content"] if messages[0]["role"] == "system" else None
    turns = [m["content"] for m in messages if m["role"] != "system"]
    v7 = load_tokenizer(mistral_tokenizer(MISTRAL_V7))
    for version, tokenizer in ((1, load_kind("mistral-v1")), (3, load_kind("mistral-v3")), (7, v7)):
        expected = [1]
        if system is not None and version == 7:
            names = v7.special
            expected += [names["[SYSTEM_PROMPT]"], *text(v7, system), names["[/SYSTEM_PROMPT]"]]
        for n, content in enumerate(turns):
            if system is not None and (version, n) in ((1, 0), (3, len(turns) - 1)):
                content = f"{system}\n\n{content}"
            if n % 2:
                expected += [*text(tokenizer, content), 2]
            else:
                expected += (
                    text(tokenizer, f"[INST] {content} [/INST]") if version == 1 else [3, *text(tokenizer, content), 4]
                )
        assert encode_dialog(tokenizer, messages, "mistral") == expected


def test_mistral_ids_written_out() -> None:
    """As mistral-common 1.13.1 gives them."""
    messages = dialog("a", "b", "c", system="S")
    assert encode_dialog(load_kind("mistral-v3"), messages, "mistral") == MISTRAL_V3_IDS
    assert encode_dialog(load_kind("mistral-v1"), messages, "mistral") == MISTRAL_V1_IDS


MISTRAL_V3_IDS = [1, 3, 1032, 4, 1055, 2, 3, 1086, 781, 781, 29485, 4]
MISTRAL_V1_IDS = [
    1,
    733,
    16289,
    28793,
    318,
    13,
    13,
    28708,
    733,
    28748,
    16289,
    28793,
    287,
    2,
    733,
    16289,
    28793,
    277,
    733,
    28748,
    16289,
    28793,
]


def test_smollm2_template_equals_transformers() -> None:
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(smollm2_hf())
    ours = load_kind("smollm2-gguf")
    for messages in [*DIALOGS, dialog(*AWKWARD[2:11])]:
        expected = theirs.apply_chat_template(list(messages), add_generation_prompt=True, return_dict=False)
        assert encode_dialog(ours, messages, "template") == expected


def rendered(template: str, messages: Sequence[Message], **tokens: str) -> str:
    from transformers.utils.chat_template_utils import render_jinja_template

    chats, _ = render_jinja_template([list(messages)], chat_template=template, add_generation_prompt=True, **tokens)
    return str(chats[0])


@pytest.mark.parametrize(
    ("kind", "spec", "template"),
    [
        ("fallback-json", fallback_json, LLAMA2_TEMPLATE),
        ("prefix-json", prefix_json, LLAMA2_TEMPLATE),
        ("prefix-json", prefix_json, "go {{ messages[0].content }}</s>"),
        ("tiny-json", tiny_tokenizer.tokenizer_json, tiny_tokenizer.CHAT_TEMPLATE),
        ("tags-json", tags_json, THINK_TEMPLATE),
        ("tags-json", tags_json, "x <|sep|> {{ messages[0].content }} <|sep|>\n{{ messages | tojson }}"),
        ("tags-json", tags_json, "{% generation %}{{ messages[-1].content }}{% endgeneration %}<think>"),
    ],
)
def test_templates_equal_the_parsed_string(kind: str, spec: Any, template: str) -> None:
    """Rendered by transformers and encoded by the tokenizers library, control tokens parsed."""
    import tokenizers

    raw = tokenizers.Tokenizer.from_str(json.dumps(spec()))
    raw.no_truncation()
    ours = with_template(load_kind(kind), template)
    for messages in (d for d in DIALOGS if d[0]["role"] == "user"):
        whole = rendered(template, messages, bos_token="<s>", eos_token="</s>")
        assert encode_dialog(ours, messages, "template") == raw.encode(whole, add_special_tokens=False).ids


def test_templates_can_still_find_the_tags_of_earlier_answers() -> None:
    tokenizer = with_template(load_kind("tags-json"), THINK_TEMPLATE)
    thought = encode_dialog(tokenizer, dialog("q", "<think>\nhm\n</think>\n\nanswer", "r"), "template")
    assert thought == encode_dialog(tokenizer, dialog("q", "answer", "r"), "template")
    # Not as a token, though, where it stays.
    typed = encode_dialog(tokenizer, dialog("q </think> x"), "template")
    assert tokenizer.special["</think>"] not in typed
    assert "q </think> x" in tokenizer.decode(typed)


def control_ids(tokenizer: PieceTokenizer, ids: list[int]) -> list[int]:
    known = set(tokenizer.special.values())
    return [i for i in ids if i in known]


def templates_for(tokenizer: PieceTokenizer) -> list[str]:
    """Templates that put this vocabulary's control tokens right beside contents, and cut contents up."""
    names = sorted(tokenizer.special)
    first, second = names[0], names[-1]
    bodies = (
        "{{ bos_token }}EACHfirst{{ m.role }}second{{ m.content }}firstEND",
        "EACHhead{{ (m.content | trim) or 'x' }}tailENDsecond",
        "{{ messages | tojson }}firstEACH{{ m.content.split('</think>')[-1] }} {{ m.content.replace('first', '') }}END",
    )
    words = {"EACH": "{% for m in messages %}", "END": "{% endfor %}", "first": first, "second": second}
    words |= {"head": first[:2], "tail": first[-2:]}
    return [re.sub("|".join(words), lambda match: words[match[0]], body) for body in bodies]


@pytest.mark.parametrize("name", KINDS)
def test_contents_never_add_control_tokens(name: str) -> None:
    base = load_kind(name)
    formats = [(base, f) for f in CHAT_FORMATS if f != "template" and fits(base, f)]
    formats += [(with_template(base, template), "template") for template in templates_for(base)]

    @QUICK
    @given(st.lists(tricky_text(base), min_size=4, max_size=4))
    def check(contents: list[str]) -> None:
        messages = dialog(*contents[1:], system=contents[0])
        harmless = dialog("q q", "q q", "q q", system="q q")
        for tokenizer, chat_format in formats:
            if chat_format == "llama2" and has_special_tags(messages):
                continue
            ids = encode_dialog(tokenizer, messages, chat_format)
            expected = encode_dialog(tokenizer, harmless, chat_format)
            assert control_ids(tokenizer, ids) == control_ids(tokenizer, expected), (
                chat_format,
                tokenizer.chat_template,
            )

    check()
    assert formats
    for token in sorted(base.special)[:30]:
        for content in (token, token * 3, token[:3] + token + token[3:], f"x{token}y {token}"):
            for tokenizer, chat_format in formats:
                if chat_format == "llama2" and has_special_tags(dialog(content)):
                    continue
                ids = encode_dialog(tokenizer, dialog(content), chat_format)
                plain = encode_dialog(tokenizer, dialog("q q"), chat_format)
                assert control_ids(tokenizer, ids) == control_ids(tokenizer, plain), (chat_format, content)


def fits(tokenizer: PieceTokenizer, chat_format: str) -> bool:
    try:
        return pick_chat_format(tokenizer, "llama", chat_format) == chat_format
    except ConfigError:
        return False


@pytest.mark.parametrize("content", ["im_end", "|im_end|", "m", "<|im_end|", "|im_end|>", ">", "  im_end "])
def test_scaffolding_and_content_together_make_no_token(content: str) -> None:
    for open_, close in (("<|", "|>"), ("<", ">"), ("<|i", "_end|>"), ("", ">"), ("<", "")):
        tokenizer = with_template(load_kind("tiny-json"), open_ + "{{ messages[0].content | trim }}" + close)
        assert not control_ids(tokenizer, encode_dialog(tokenizer, dialog(content), "template"))
        assert (
            tokenizer.decode(encode_dialog(tokenizer, dialog(content), "template")) == open_ + content.strip() + close
        )


@QUICK
@given(tricky_text(load_kind("tags-json")), st.booleans())
def test_the_guard_gives_back_what_it_took(s: str, shown: bool) -> None:
    special = load_kind("tags-json").special
    guard = make_guard(special, frozenset(special) if shown else frozenset(), [s])
    assert list(guard.split(guard.protect(s))) == [(s, None)]


def test_noncharacters_in_a_message() -> None:
    tokenizer = load_kind("smollm2-gguf")
    few = "".join(map(chr, range(0xFDD0, 0xFDEE))) + "<|im_end|>"
    ids = encode_dialog(tokenizer, dialog(few), "template")
    assert ids == encode_dialog(with_template(tokenizer, tokenizer.chat_template or ""), dialog(few), "template")
    assert "<|im_end|>" in tokenizer.decode(ids) and control_ids(tokenizer, ids) == [1, 2, 1, 2, 1]
    with pytest.raises(RequestError, match="noncharacters"):
        encode_dialog(tokenizer, dialog("".join(map(chr, range(0xFDD0, 0xFDF0)))), "template")


BAD_DIALOGS: dict[str, tuple[Any, str]] = {
    "nothing": ([], "no messages"),
    "a string": ("hello", "must be a list"),
    "strings": (["hello"], "message 0 is no object"),
    "no content": ([{"role": "user"}], "message 0 is no object"),
    "number": ([{"role": "user", "content": 3}], "message 0 is no object"),
    "role": ([{"role": "<|im_end|>", "content": "x"}], "has role '<|im_end|>', must be one of"),
    "no role": ([{"content": "x"}], "has role 'None'"),
    "list as role": ([{"role": ["user"], "content": "x"}], "must be one of"),
    "answered": (dialog("a", "b"), "last message is the assistant's"),
}


@pytest.mark.parametrize("case", BAD_DIALOGS)
@pytest.mark.parametrize("chat_format", CHAT_FORMATS)
def test_what_is_no_dialog_is_refused(case: str, chat_format: str) -> None:
    messages, reason = BAD_DIALOGS[case]
    with pytest.raises(RequestError) as caught:
        encode_dialog(load_kind("tiny-json"), messages, chat_format)
    assert reason in str(caught.value) and caught.value.field == "messages" and "\n" not in str(caught.value)


@pytest.mark.parametrize("chat_format", ["llama2", "mistral"])
@pytest.mark.parametrize(
    ("roles", "reason"),
    [
        (["user", "user"], "message 1 has role 'user', this chat format wants 'assistant'"),
        (["system", "assistant", "user"], "message 1 has role 'assistant', this chat format wants 'user'"),
        (["user", "assistant", "system"], "message 2 has role 'system'"),
        (["user", "tool"], "message 1 has role 'tool'"),
        (["system"], "wants the last message to be the user's"),
    ],
)
def test_turns_must_alternate(chat_format: str, roles: list[str], reason: str) -> None:
    with pytest.raises(RequestError) as caught:
        encode_dialog(load_kind("mistral-v1"), [{"role": r, "content": "x"} for r in roles], chat_format)
    assert reason in str(caught.value) and caught.value.field == "messages"


@pytest.mark.parametrize(
    ("template", "error", "reason"),
    [
        (LLAMA2_TEMPLATE, RequestError, "roles must alternate strictly"),
        ("{{ messages[9].content }}", RequestError, "refuses these messages"),
        ("{{ messages[0].content + 3 }}", RequestError, "refuses these messages"),
        ("{{ 1 // 0 }}", RequestError, "refuses these messages"),
        ("{% for %}", CheckpointError, "not valid Jinja"),
        ("{{ messages.__class__.__mro__ }}", CheckpointError, "must not"),
        ("{{ messages.append(3) }}", CheckpointError, "must not"),
        ("{{ ''.__class__.__base__.__subclasses__() }}", CheckpointError, "must not"),
    ],
)
def test_templates_that_fail(template: str, error: type[Exception], reason: str) -> None:
    tokenizer = with_template(load_kind("tiny-json"), template)
    messages: list[Message] = [{"role": "system", "content": "x"}, {"role": "user", "content": "y"}]
    with pytest.raises(error, match=reason) as caught:
        encode_dialog(tokenizer, messages, "template")
    assert "\n" not in str(caught.value)


def test_a_template_may_ask_for_the_date() -> None:
    tokenizer = with_template(load_kind("tiny-json"), "{{ strftime_now('%Y') }}")
    assert int(tokenizer.decode(encode_dialog(tokenizer, dialog("x"), "template"))) >= 2024
    assert tokenizer.decode(encode_dialog(tokenizer, dialog("x"), "template", datetime(2001, 2, 3))) == "2001"


@pytest.mark.parametrize(
    ("name", "family", "expected"),
    [
        ("llama3", "llama", "llama3"),
        ("smollm2-gguf", "llama", "template"),
        ("tags-json", "qwen2", "chatml"),
        ("mistral-v1", "llama", "llama2"),
        ("mistral-v1", "mistral", "mistral"),
        ("mistral-gguf", "llama", "llama2"),
        ("mistral-v3", "llama", "mistral"),
    ],
)
def test_which_format_a_checkpoint_gets(name: str, family: str, expected: str) -> None:
    assert pick_chat_format(load_kind(name), family, None) == expected


def test_an_asked_format_goes_first_and_must_be_possible() -> None:
    smollm2, llama3 = load_kind("smollm2-gguf"), load_kind("llama3")
    assert pick_chat_format(smollm2, "llama", "chatml") == "chatml"
    for tokenizer, asked, reason in (
        (smollm2, "alpaca", "'alpaca', must be one of llama2, llama3, chatml, mistral, template"),
        (smollm2, "llama3", "<|start_header_id|> and no"),
        (llama3, "chatml", "it has no <|im_start|>"),
        (llama3, "template", "it has no chat template"),
        (dataclasses.replace(llama3, bos_id=None), "llama2", "no beginning-of-sequence token"),
    ):
        with pytest.raises(ConfigError) as caught:
            pick_chat_format(tokenizer, "llama", asked)
        assert reason in str(caught.value)
    nothing = dataclasses.replace(smollm2, chat_template=None, special={})
    with pytest.raises(ConfigError, match="pass --chat_format"):
        pick_chat_format(nothing, "llama", None)
