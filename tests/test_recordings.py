"""Recorded passes of one token a sequence leave every bit as it was."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from llama_dist.model.cache import Span, lay
from llama_dist.model.recordings import Recordings, Results, Seats, Step, rows_for, stop_for
from tests import tiny
from tests.conftest import Saver
from tests.recording_jobs import angles_move, answers
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


def test_batches_are_laid_out_where_recordings_read_them() -> None:
    span = Span([3, 5], 17, 1, 4)
    laid = lay([(span, [9]), (Span([0, 1, 2], 40, 1, 4), [7])], torch.device("cpu"))
    seats, plain = Seats(3, 512, torch.device("cpu")), laid.batch
    for _ in range(2):
        seats.take(laid)
        for name in ("tokens", "positions", "lengths", "slots", "starts", "counts"):
            ours, theirs = getattr(seats.batch, name), getattr(plain, name)
            assert ours.dtype == theirs.dtype and ours.tolist() == [*theirs.tolist(), theirs[-1].item()], name
        assert torch.equal(seats.batch.tables[:2, :3], plain.tables) and seats.batch.tables.shape == (3, 32)
    assert [stop_for(n) for n in (1, 512, 513, 2049, 9000)] == [512, 512, 2048, 8192, 32768]


def test_all_recordings_leave_their_results_in_one_place() -> None:
    device = torch.device("cpu")
    made: list[tuple[torch.Tensor, ...]] = []

    def record(step: Step) -> tuple[Callable[[], object], Results]:
        made.append(step())
        return (lambda: step()), made[-1]

    recordings = Recordings(lambda b: (b.tokens * 2,), lambda b, x: (x[0] + 1, b.positions), record, 64, device)
    for n in (2, 4, 1, 3, 2):
        laid = lay([(Span([i], i, 1, 1), [10 + i]) for i in range(n)], device)
        assert recordings.serves(laid)
        for _ in range(2):
            doubled, positions = recordings.run(laid)
            assert doubled.tolist() == [21 + 2 * i for i in range(n)] and positions.tolist() == [*range(n)]
    ends = [results for results in made if len(results) == 2]
    assert [len(first) for first, _ in ends] == [2, 4, 1, 3]
    assert len({first.untyped_storage().data_ptr() for first, _ in ends}) == 2  # of two rows, and then of four


@pytest.mark.spmd
def test_what_recordings_read_stays_where_it_is(checkpoint: Saver) -> None:
    """The table of angles grows by moving, and a recording would go on reading the old one."""
    [moved] = run_ranks(1, angles_move, str(checkpoint(CASES[0], "hf")))
    assert not moved


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
