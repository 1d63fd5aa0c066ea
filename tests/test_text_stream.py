"""Streaming: the parts add up to the whole, characters come out complete, and cost does not grow with length."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_dist.text.stream import TextStream
from llama_dist.text.tokenizer import PieceTokenizer
from tests.text_kinds import AWKWARD, KINDS, load_kind

QUICK = settings(max_examples=60)


def streamed(tokenizer: PieceTokenizer, ids: list[int]) -> str:
    stream = TextStream(tokenizer)
    return "".join([*(stream.push(i) for i in ids), stream.finish()])


@pytest.mark.parametrize("name", KINDS)
def test_parts_add_up_to_decode(name: str) -> None:
    tokenizer = load_kind(name)
    single_bytes = [i for i, piece in enumerate(tokenizer.pieces) if len(piece) == 1]
    any_id = st.one_of(
        st.integers(0, tokenizer.n_words - 1),
        st.sampled_from(single_bytes),
        st.sampled_from(sorted(tokenizer.special.values())),
        st.integers(-2, tokenizer.n_words + 1000),
    )

    @QUICK
    @given(st.lists(any_id, max_size=20))
    def any_ids(ids: list[int]) -> None:
        assert streamed(tokenizer, ids) == tokenizer.decode(ids)

    @QUICK
    @given(st.text(max_size=20))
    def any_text(s: str) -> None:
        ids = tokenizer.encode(s, bos=True, eos=True)
        assert streamed(tokenizer, ids) == tokenizer.decode(ids)

    any_ids()
    any_text()
    for s in AWKWARD:
        ids = tokenizer.encode(s, bos=False, eos=False)
        assert streamed(tokenizer, ids) == tokenizer.decode(ids)


@pytest.mark.parametrize("name", ["mistral-v1", "llama3", "smollm2-gguf", "tiny-json", "fallback-json"])
def test_a_character_appears_when_it_is_complete(name: str) -> None:
    tokenizer = load_kind(name)
    stream = TextStream(tokenizer)
    parts = [stream.push(i) for i in tokenizer.encode("a\U0001f9ff\u4f60\u597d", bos=False, eos=False)]
    assert "".join(parts) == "a\U0001f9ff\u4f60\u597d"
    assert not any("\ufffd" in part for part in parts)
    assert "" in parts, "the emoji has no token of its own in these vocabularies"
    assert stream.finish() == ""


@pytest.mark.parametrize(("name", "left"), [("mistral-v1", "\ufffd\ufffd\ufffd"), ("llama3", "\ufffd")])
def test_finish_shows_what_was_cut_off(name: str, left: str) -> None:
    tokenizer = load_kind(name)
    table = {piece: i for i, piece in enumerate(tokenizer.pieces)}
    stream = TextStream(tokenizer)
    assert [stream.push(table[bytes([byte])]) for byte in "\U0001f600".encode()[:3]] == ["", "", ""]
    assert stream.finish() == left


def test_only_the_first_space_is_dropped() -> None:
    tokenizer = load_kind("mistral-v1")
    table = {piece: i for i, piece in enumerate(tokenizer.pieces)}
    stream = TextStream(tokenizer)
    ids = [1, table[b" Hello"], table[b" Hello"], 2, table[b" Hello"]]
    assert [stream.push(i) for i in ids] == ["", "Hello", " Hello", "", " Hello"]


def test_a_token_reads_its_own_piece_only() -> None:
    """Counts look-ups: one a token, however long the text has become."""
    reads: list[int] = []

    class Counted(list[bytes]):
        def __getitem__(self, i: int) -> bytes:  # type: ignore[override]
            reads.append(i)
            return super().__getitem__(i)

    tokenizer = load_kind("llama3")
    original = tokenizer.pieces
    tokenizer.pieces = Counted(original)
    try:
        ids = tokenizer.encode("many words " * 500, bos=False, eos=False)
        assert streamed(tokenizer, ids) == "many words " * 500
    finally:
        tokenizer.pieces = original
    assert reads == ids
