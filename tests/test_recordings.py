"""Recorded passes of one token a sequence leave every bit as it was."""

from __future__ import annotations

import pytest

from llama_dist.model.recordings import rows_for
from tests import tiny
from tests.conftest import Saver
from tests.recording_jobs import answers
from tests.reproducible_jobs import WAYS, prompts
from tests.spmd import run_ranks
from tests.triton_cases import DEVICES

CASES = ["llama-9-3", "mistral-window"]


def test_few_rows_are_copies() -> None:
    made = sorted({rows_for(n) for n in range(1, 257)})
    assert made == [1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256]
    for n in range(1, 257):
        assert rows_for(n) == min(rows for rows in made if rows >= n)
        assert 3 * (rows_for(n) - n) <= rows_for(n), n


@pytest.mark.spmd
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("case", CASES)
def test_the_same_bits(checkpoint: Saver, case: str, way: str, device: str) -> None:
    """Recordings of several sizes follow one another, full and filled up, with prompts between them."""
    folder, asked = str(checkpoint(case, "hf")), prompts(12, tiny.VOCAB)
    [(plain, _)] = run_ranks(1, answers, folder, device, way, "plain", asked)
    [(rows, played)] = run_ranks(1, answers, folder, device, way, "recorded", asked)
    assert rows == plain
    sizes = set(played)
    assert len(played) >= 8 and sizes <= {rows_for(n) for n in sizes}
    assert (sizes == {1}) == (way == "alone") and (len(sizes) > 2 or way != "together"), sizes


@pytest.mark.spmd
def test_a_recording_that_fails_costs_nothing_but_time(checkpoint: Saver) -> None:
    folder, asked = str(checkpoint(CASES[0], "hf")), prompts(5, tiny.VOCAB)
    [(plain, _)] = run_ranks(1, answers, folder, "cpu", "together", "plain", asked)
    [(rows, played)] = run_ranks(1, answers, folder, "cpu", "together", "refused", asked)
    assert rows == plain and not played
