"""Tokenizers of every kind: equal to the reference of their format, lossless, and blind to control tokens in text."""

from __future__ import annotations

import base64
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_dist.errors import CheckpointError
from llama_dist.text.load import find_tokenizer, load_tokenizer, tokenizer_from_gguf
from llama_dist.text.tiktoken_file import cut
from llama_dist.text.tokenizer import PieceTokenizer
from tests import tiny_tokenizer
from tests.assets import llama3_tokenizer, llama_models_path, mistral_tokenizer, smollm2_hf
from tests.text_kinds import (
    AWKWARD,
    BLANKS,
    KINDS,
    MISTRAL_V3,
    MISTRAL_V7,
    SENTENCEPIECE_LIKE,
    added,
    fallback_json,
    from_json,
    load_kind,
    mistral_metadata,
    smollm2_metadata,
    tricky_text,
)

QUICK = settings(max_examples=60)


def encode(tokenizer: PieceTokenizer, s: str) -> list[int]:
    return tokenizer.encode(s, bos=False, eos=False)


@pytest.mark.parametrize("name", ["tokenizer.model.v1", MISTRAL_V3, MISTRAL_V7])
def test_sentencepiece_equals_the_library(name: str) -> None:
    import sentencepiece

    path = mistral_tokenizer(name)
    ours, theirs = load_tokenizer(path), sentencepiece.SentencePieceProcessor(model_file=str(path))
    for s in AWKWARD:
        ids = theirs.encode(s)
        assert ours.encode(s, bos=True, eos=True) == [1, *ids, 2]
        assert ours.decode(ids) == theirs.decode(ids)
    assert (ours.kind, ours.n_words, ours.bos_id, ours.eos_id, ours.pad_id) == (
        "sentencepiece",
        theirs.vocab_size(),
        theirs.bos_id(),
        theirs.eos_id(),
        -1,
    )
    assert ours.add_bos and ours.stop_ids == {2} and ours.special["</s>"] == 2


@QUICK
@given(st.lists(st.one_of(st.integers(0, 300), st.integers(0, 31999)), max_size=12))
def test_sentencepiece_decodes_any_ids_as_the_library(ids: list[int]) -> None:
    import sentencepiece

    theirs = sentencepiece.SentencePieceProcessor(model_file=str(mistral_tokenizer()))
    assert load_kind("mistral-v1").decode(ids) == theirs.decode(ids)


def test_user_defined_tags_of_sentencepiece_stay_text() -> None:
    import sentencepiece

    path = mistral_tokenizer(MISTRAL_V7)
    tag = "[REFERENCE_DOC_1]"
    ours, theirs = load_tokenizer(path), sentencepiece.SentencePieceProcessor(model_file=str(path))
    assert ours.special[tag] in theirs.encode(tag)
    assert ours.special[tag] not in encode(ours, tag)
    assert ours.decode(encode(ours, tag)) == tag == ours.decode([ours.special[tag]])


@pytest.fixture(scope="module")
def meta_tokenizer() -> Any:
    path = str(llama_models_path())
    sys.path.insert(0, path)
    try:
        from llama_models.llama3.tokenizer import Tokenizer
    finally:
        sys.path.remove(path)
    return Tokenizer(llama3_tokenizer())


def test_tiktoken_equals_metas_reference(meta_tokenizer: Any) -> None:
    ours = load_kind("llama3")
    long = ["a" * 60_001, " " * 26_000 + "b", ("word " * 30 + "\n") * 700, "x" * 25_000 + " " + "y" * 25_001]
    for s in [*AWKWARD, *long, "\ud800 lone surrogate", *meta_tokenizer.special_tokens]:
        expected = meta_tokenizer.encode(s, bos=True, eos=True)
        assert ours.encode(s, bos=True, eos=True) == expected
        assert ours.decode(expected) == meta_tokenizer.decode(expected[1:-1])
    assert ours.special == meta_tokenizer.special_tokens
    assert ours.stop_ids == set(meta_tokenizer.stop_tokens)
    for name in ("n_words", "bos_id", "eos_id", "pad_id"):
        assert getattr(ours, name) == getattr(meta_tokenizer, name)


@QUICK
@given(st.text())
def test_tiktoken_equals_metas_reference_on_any_text(meta_tokenizer: Any, s: str) -> None:
    assert encode(load_kind("llama3"), s) == meta_tokenizer.encode(s, bos=False, eos=False)


@QUICK
@given(st.lists(st.tuples(st.sampled_from("a \n\u3000"), st.integers(1, 60_000)), max_size=12))
def test_long_runs_are_cut_as_in_metas_reference(meta_tokenizer: Any, runs: list[tuple[str, int]]) -> None:
    s = "".join(c * n for c, n in runs)
    windows = [s[i : i + 400_000] for i in range(0, len(s), 400_000)]
    expected = [p for w in windows for p in meta_tokenizer._split_whitespaces_or_nonwhitespaces(w, 25_000)]
    assert list(cut(s)) == expected


def test_gguf_equals_transformers_and_its_own_json() -> None:
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(smollm2_hf())
    ours, json_kind = load_kind("smollm2-gguf"), load_tokenizer(smollm2_hf())
    assert (ours.kind, json_kind.kind) == ("gguf", "tokenizer.json")
    for s in AWKWARD[:-1]:
        expected = theirs.encode(s, add_special_tokens=False)
        assert encode(ours, s) == expected == encode(json_kind, s)
        assert ours.decode(expected) == theirs.decode(expected) == json_kind.decode(expected)
    for tokenizer in (ours, json_kind):
        assert tokenizer.special == theirs.get_added_vocab()
        assert (tokenizer.n_words, tokenizer.bos_id, tokenizer.eos_id) == (49152, 1, 2)
        assert not tokenizer.add_bos and tokenizer.stop_ids == {0, 2}
        assert tokenizer.chat_template == theirs.chat_template


@pytest.mark.parametrize("other", ["mistral-gguf", "fallback-json"])
def test_the_same_pieces_from_another_file_encode_alike(other: str) -> None:
    original, copy = load_kind("mistral-v1"), load_kind(other)
    for s in AWKWARD[:-1]:
        ids = encode(original, s)
        assert encode(copy, s) == ids
        assert copy.decode(ids) == original.decode(ids)
    assert (copy.bos_id, copy.stop_ids, copy.add_bos) == (1, {2}, True)


@QUICK
@given(st.text())
def test_gguf_pieces_encode_any_text_as_sentencepiece(s: str) -> None:
    assert encode(load_kind("mistral-gguf"), s) == encode(load_kind("mistral-v1"), s)


@pytest.mark.parametrize("name", KINDS)
def test_text_never_becomes_a_control_token_and_comes_back(name: str) -> None:
    tokenizer = load_kind(name)
    control = set(tokenizer.special.values())
    known = {piece[0] for piece in tokenizer.pieces if len(piece) == 1}

    @QUICK
    @given(tricky_text(tokenizer))
    def check(s: str) -> None:
        ids = encode(tokenizer, s)
        assert not control & set(ids)
        back = tokenizer.decode(ids)
        if name in SENTENCEPIECE_LIKE:
            # U+2581 is how sentencepiece writes a space.
            s = s.replace("\u2581", " ")
        if name == "prefix-json" and s.startswith(" "):
            # The tokenizers library puts no second space before one, and yet takes one away.
            s = s[1:]
        # The one vocabulary has no token for bytes its training never saw, the other file normalises.
        if name != "tags-json" and (name != "smollm2-gguf" or set(s.encode()) <= known):
            assert back == s

    check()
    for text in tokenizer.special:
        assert not control & set(encode(tokenizer, text)), text
        assert tokenizer.decode(encode(tokenizer, text)) == text


@pytest.mark.parametrize("name", KINDS)
def test_lone_surrogates_read_as_replacement_characters(name: str) -> None:
    tokenizer = load_kind(name)
    assert tokenizer.decode(encode(tokenizer, "a\ud800b\ud83d\ude00")) == "a\ufffdb\U0001f600"


@pytest.mark.parametrize("name", KINDS)
def test_control_tokens_and_foreign_ids_are_left_out_of_text(name: str) -> None:
    tokenizer = load_kind(name)
    ids = encode(tokenizer, "ab cd")
    hidden = [i for i in tokenizer.special.values() if not tokenizer.pieces[i]][:20]
    mixed = [*hidden, *ids[:1], *hidden, *ids[1:], tokenizer.n_words, 10**9, -1]
    assert tokenizer.decode(mixed) == "ab cd"


def test_json_with_added_tokens_of_every_sort() -> None:
    tokenizer = load_kind("tags-json")
    n = tiny_tokenizer.N_WORDS
    # Blanks that someone added are text: they keep their id.
    assert encode(tokenizer, "a" + BLANKS + "b") == [*encode(tokenizer, "a"), n + 3, *encode(tokenizer, "b")]
    assert tokenizer.special["</think>"] == n + 1 and BLANKS not in tokenizer.special
    assert tokenizer.decode([n, n + 1, n + 2, n + 3]) == "<think></think>" + BLANKS
    assert (tokenizer.strip_left, tokenizer.strip_right) == ({"<|sep|>"}, {"<|sep|>"})
    assert encode(tokenizer, "e\u0301") == encode(tokenizer, "\u00e9")
    assert tokenizer.n_words == n + 6


def test_json_is_not_truncated_by_its_own_settings() -> None:
    assert len(encode(load_kind("fallback-json"), "one two three four five six")) == 6


def test_what_stands_beside_tokenizer_json() -> None:
    spec = tiny_tokenizer.tokenizer_json()
    alone = from_json(spec)
    assert (alone.bos_id, alone.add_bos, alone.eos_id, alone.pad_id) == (0, True, None, -1)
    assert alone.stop_ids == {tiny_tokenizer.IM_END} and alone.chat_template is None
    full = from_json(
        spec,
        tokenizer_config={"bos_token": {"content": "<s>"}, "eos_token": "</s>", "add_bos_token": False},
        special_tokens_map={"pad_token": {"content": "<pad>"}, "eos_token": "<pad>"},
        generation_config={"eos_token_id": [7, 8]},
        config={"eos_token_id": 9, "bos_token_id": 3},
    )
    assert (full.bos_id, full.add_bos, full.eos_id, full.pad_id) == (0, False, 1, 4)
    assert full.stop_ids == {1, 3, 7, 8, 9}
    spec["post_processor"] = None
    bare = from_json(spec, config={"eos_token_id": 9, "bos_token_id": 3}, generation_config={"eos_token_id": 1})
    assert (bare.bos_id, bare.add_bos, bare.eos_id) == (3, False, 1)


def test_where_a_chat_template_comes_from(tmp_path: Path) -> None:
    tiny_tokenizer.save_hf(tmp_path)
    assert load_tokenizer(tmp_path).chat_template == tiny_tokenizer.CHAT_TEMPLATE
    named = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "yes"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    assert load_tokenizer(tmp_path).chat_template == "yes"
    (tmp_path / "chat_template.jinja").write_text("own file")
    assert load_tokenizer(tmp_path).chat_template == "own file"


def test_the_kind_is_read_off_the_content(tmp_path: Path) -> None:
    assert find_tokenizer(tmp_path) is None
    with pytest.raises(CheckpointError, match=r"neither tokenizer\.json nor tokenizer\.model"):
        load_tokenizer(tmp_path)
    with pytest.raises(CheckpointError, match="does not exist"):
        load_tokenizer(tmp_path / "none")
    odd = tmp_path / "tokenizer.json"
    tiny_tokenizer.save_tiktoken(odd)
    assert load_tokenizer(odd).kind == "tiktoken"
    (tmp_path / "tokenizer.model").write_text(json.dumps(tiny_tokenizer.tokenizer_json()))
    assert load_tokenizer(tmp_path / "tokenizer.model").kind == "tokenizer.json"
    assert find_tokenizer(tmp_path) == odd
    odd.unlink()
    assert find_tokenizer(tmp_path) == tmp_path / "tokenizer.model"
    (tmp_path / "tokenizer.model").unlink()
    (tmp_path / "tokenizer.model.v1").write_bytes(mistral_tokenizer().read_bytes())
    assert load_tokenizer(tmp_path).kind == "sentencepiece"


def ranks(*changes: tuple[int, str]) -> bytes:
    lines = {i: f"{base64.b64encode(bytes([i])).decode()} {i}" for i in range(256)} | dict(changes)
    return "\n".join(lines.values()).encode()


def changed(**changes: Any) -> bytes:
    return json.dumps({**tiny_tokenizer.tokenizer_json(), **changes}).encode()


BAD_FILES = {
    "empty": (b"", "is empty"),
    "noise": (bytes(range(128, 256)) * 9, "is neither"),
    "text": (b"hello world\n" * 9, "is neither"),
    "no pieces": (b"\x12\x00", "without pieces"),
    "gguf": (b"GGUF\x03\0\0\0", "GGUF"),
    "cut sentencepiece": (b"\x0a\x0e\x0a\x05<unk>\x15\0\0", "is neither"),
    "piece that is no text": (b"\x0a\x04\x0a\x02\xff\xfe", "is neither"),
    "sentencepiece without <unk>": (b"\x0a\x0a\x0a\x03abc\x15\0\0\0\0", "refuses"),
    "rank twice": (ranks((7, f"{base64.b64encode(b'zz').decode()} 6")), "ranks are not"),
    "token twice": (ranks((256, "AA== 256")), "repeats the token"),
    "huge rank": (ranks((256, "enp6 " + "9" * 5000)), "line 257"),
    "not base64": (ranks((9, "A 9")), "line 10 is not base64"),
    "no rank": (ranks((9, "CQ==")), "line 10"),
    "byte missing": (ranks((255, "enp6 255")), "no token for byte 0xff"),
    "bad json": (b'{"model": ', "not valid JSON"),
    "deep json": (b"[" * 100_000, "not valid JSON"),
    "json list": (b"[]", "must be an object"),
    "config": (b'{"vocab_size": 3}', "no 'model'"),
    "unigram": (changed(model={"type": "Unigram", "vocab": []}), "'Unigram' is not supported"),
    "vocab of lists": (changed(model={"type": "BPE", "vocab": {"a": [1]}, "merges": []}), "'vocab' must"),
    "far id": (changed(model={"type": "BPE", "vocab": {"a": 10_000_000}, "merges": []}), "far above"),
    "negative id": (changed(added_tokens=[added(-1, "x")]), "'added_tokens'"),
    "tokens without id": (changed(added_tokens=[{"content": "x"}]), "'added_tokens'"),
    "merge of strangers": (changed(model={"type": "BPE", "vocab": {"a": 9}, "merges": ["q z"]}), "refuses"),
    "merge of three": (changed(model={"type": "BPE", "vocab": {"<s>": 0}, "merges": [["a", "b", "c"]]}), "'merges'"),
    "decoder": (changed(decoder={"type": "WordPiece", "prefix": "##", "cleanup": True}), "decoder"),
}


@pytest.mark.parametrize("case", BAD_FILES)
def test_a_bad_file_is_refused_in_one_line(tmp_path: Path, case: str) -> None:
    data, reason = BAD_FILES[case]
    path = tmp_path / "tokenizer.model"
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=reason) as caught:
        load_tokenizer(path)
    assert "\n" not in str(caught.value) and str(path) in str(caught.value) and len(str(caught.value)) < 500


def test_a_bad_file_beside_it_is_named(tmp_path: Path) -> None:
    tiny_tokenizer.save_hf(tmp_path)
    (tmp_path / "generation_config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"generation_config\.json is not valid JSON"):
        load_tokenizer(tmp_path)


BAD_GGUF: dict[str, tuple[dict[str, Any], str]] = {
    "pre": ({"tokenizer.ggml.pre": "martian"}, "'martian', known are"),
    "model": ({"tokenizer.ggml.model": "bert"}, "'bert', only"),
    "no model": ({"tokenizer.ggml.model": None}, "must be a str"),
    "no tokens": ({"tokenizer.ggml.tokens": []}, "is empty"),
    "tokens": ({"tokenizer.ggml.tokens": [1, 2]}, "than strings"),
    "types": ({"tokenizer.ggml.token_type": [1]}, "token_type must be"),
    "bos": ({"tokenizer.ggml.bos_token_id": 10**9}, "bos_token_id is 1000000000"),
    "flag": ({"tokenizer.ggml.add_bos_token": "yes"}, "true or false"),
    "scores": ({"tokenizer.ggml.model": "llama"}, "scores is missing"),
    "few scores": ({"tokenizer.ggml.model": "llama", "tokenizer.ggml.scores": [0.5]}, "scores must be"),
}


@pytest.mark.parametrize("case", BAD_GGUF)
def test_bad_gguf_metadata_are_refused(case: str) -> None:
    change, reason = BAD_GGUF[case]
    with pytest.raises(CheckpointError, match=reason):
        tokenizer_from_gguf(smollm2_metadata() | change)


def test_gguf_pieces_that_sentencepiece_cannot_take_are_refused() -> None:
    metadata = mistral_metadata()
    metadata["tokenizer.ggml.tokens"][500] = metadata["tokenizer.ggml.tokens"][501]
    with pytest.raises(CheckpointError, match="refuses"):
        tokenizer_from_gguf(metadata)


def test_gguf_ids_named_as_ends_stop_an_answer_and_are_no_text() -> None:
    tokens = [*tiny_tokenizer.words(), "<end>", "word"]
    metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.merges": [" ".join(merge) for merge in tiny_tokenizer.MERGES],
        "tokenizer.ggml.token_type": [1] * (len(tokens) - 2) + [4, 4],
        "tokenizer.ggml.eos_token_id": 1,
        "tokenizer.ggml.eot_token_id": 3,
    }
    tokenizer = tokenizer_from_gguf(metadata)
    assert tokenizer.stop_ids == {1, 3} and tokenizer.bos_id is None and not tokenizer.add_bos
    assert tokenizer.special == {"</s>": 1, "<|im_end|>": 3, "<end>": len(tokens) - 2}
    # An added word is text, an added tag is shown but never read.
    assert encode(tokenizer, "word") == [len(tokens) - 1]
    assert tokenizer.decode([1, 3, len(tokens) - 2, len(tokens) - 1]) == "<end>word"
    assert tokenizer_from_gguf(metadata | {"tokenizer.ggml.pre": "llama-bpe"}).add_bos is False
    with_bos = {"tokenizer.ggml.pre": "llama-bpe", "tokenizer.ggml.bos_token_id": 0}
    assert tokenizer_from_gguf(metadata | with_bos).add_bos


PATTERNS = {
    "llama-bpe": ("I'LL 12345\n\n x", ["I", "'LL", " ", "123", "45", "\n\n", " x"]),
    "qwen2": ("I'LL 123\n\n x", ["I", "'LL", " ", "1", "2", "3", "\n\n", " x"]),
    "gpt-2": ("I'll 12345\n\n x", ["I", "'ll", " 12345", "\n\n", " x"]),
    "smollm": ("I'll 123\n\n x", ["I", "'ll", " ", "1", "2", "3", "\n\n", " x"]),
    "tekken": ("fooBar 12//\n x", ["foo", "Bar", " ", "1", "2", "//\n", " x"]),
}


@pytest.mark.parametrize("pre", PATTERNS)
def test_gguf_pre_tokenizers_cut_words(pre: str) -> None:
    """Every word of the text is in the vocabulary with merges that would also join over the cuts."""
    s, words = PATTERNS[pre]
    letters = tiny_tokenizer.byte_letters()
    spelled = ["".join(letters[b] for b in word.encode()) for word in words]
    whole = "".join(spelled)
    joined = [whole[i:j] for i in range(len(whole)) for j in range(i + 2, len(whole) + 1)]
    tokens = list(dict.fromkeys([*letters.values(), *joined]))
    merges = list(dict.fromkeys(f"{text[:-1]} {text[-1]}" for text in sorted(joined, key=len)))
    tokenizer = tokenizer_from_gguf(
        {
            "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.pre": pre,
            "tokenizer.ggml.tokens": tokens,
            "tokenizer.ggml.merges": merges,
        }
    )
    found = encode(tokenizer, s)
    ends = {len("".join(words[: n + 1]).encode()) for n in range(len(words))}
    assert ends <= set(_ends(tokenizer, found))
    # No id goes over a cut; within a word letters may be merged in any way.
    position, cuts = 0, sorted(ends)
    for i in found:
        following = next(end for end in cuts if end > position)
        position += len(tokenizer.pieces[i])
        assert position <= following


def _ends(tokenizer: PieceTokenizer, ids: list[int]) -> list[int]:
    lengths = [len(tokenizer.pieces[i]) for i in ids]
    return [sum(lengths[: n + 1]) for n in range(len(lengths))]


def test_merges_that_spell_a_control_token_are_dropped() -> None:
    tokenizers = pytest.importorskip("tokenizers")
    spec = fallback_json()
    spec["added_tokens"] = []
    naive = tokenizers.Tokenizer.from_str(json.dumps(spec | {"truncation": None, "post_processor": None}))
    assert 1 in naive.encode("a<s>b").ids
    assert 1 not in encode(load_kind("fallback-json"), "a<s>b")


def test_importing_the_room_loads_nothing_heavy() -> None:
    code = (
        "import sys, llama_dist.text.load, llama_dist.text.chat, llama_dist.text.stream;"
        "print(sorted({'torch', 'sentencepiece', 'tiktoken', 'tokenizers', 'jinja2', 'gguf'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
