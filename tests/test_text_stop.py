"""Stop strings against a plain search of the whole text, wherever the borders of tokens lie."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from llama_dist.text.load import load_tokenizer
from llama_dist.text.stop import StopMatcher
from tests import tiny_tokenizer
from tests.conftest import Saver

WORDS = st.lists(st.text("ab<é☃", min_size=1, max_size=3), min_size=1, max_size=3)


def plain(text_after: list[str], stops: list[str], first: int) -> tuple[int, int] | None:
    """(tokens read, length of the text that stands) at the first token with which a stop string is complete."""
    for n in range(max(1, first), len(text_after) + 1):
        found = [text_after[n - 1].find(s) for s in stops if s in text_after[n - 1]]
        # a stop string that was complete before anyone looked for it does not count
        late = [at for s, at in ((s, text_after[n - 1].find(s)) for s in stops) if at >= 0]
        if found and late:
            return n, min(late)
    return None


def test_a_stop_string_is_found_across_tokens(checkpoint: Saver) -> None:
    tokenizer = load_tokenizer(checkpoint("llama-gqa", "hf"))

    @given(st.lists(st.integers(5, tiny_tokenizer.N_WORDS - 1), max_size=40), st.text("ab<é☃ e", max_size=20), WORDS)
    @settings(max_examples=300)
    def check(ids: list[int], text: str, stops: list[str]) -> None:
        ids = ids[:5] + tokenizer.encode(text, bos=False, eos=False) + ids[5:]
        matcher = StopMatcher(tokenizer, stops)
        texts = [_readable(tokenizer.decode(ids[:n]), tokenizer.decode(ids[: n + 1])) for n in range(1, len(ids) + 1)]
        got = next(((n, at) for n, i in enumerate(ids, 1) if (at := matcher.push(i)) is not None), None)
        assert got == plain(texts, stops, 1)

    check()


def _readable(text: str, longer: str) -> str:
    """What is certain of a text whose last character may still be incomplete."""
    while text and not longer.startswith(text):
        text = text[:-1]
    return text.rstrip("\ufffd")


def test_an_unarmed_matcher_only_reads(checkpoint: Saver) -> None:
    tokenizer = load_tokenizer(checkpoint("llama-gqa", "hf"))
    ids = tokenizer.encode("ab ab ab", bos=False, eos=False)
    matcher = StopMatcher(tokenizer, ["ab"])
    found = [matcher.push(i, armed=n >= 4) for n, i in enumerate(ids, 1)]
    assert found[:3] == [None, None, None]
    at = next(x for x in found if x is not None)
    assert "ab ab ab"[at : at + 2] == "ab" and at > 0
