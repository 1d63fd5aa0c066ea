"""Passes of one token a sequence, recorded once on a GPU and played again: two launches for a step, not one a kernel.

A recording has its own number of rows, and of keys that they may have. A batch is filled up with copies of its last
row, which compute and write what that row does; recordings are made for numbers that leave at most a third of the rows
to copies.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from llama_dist.model.cache import PAGE_SIZE, Batch, Laid

log = logging.getLogger("llama_dist")

SHORT = 512  # tokens
MOST = 256  # rows; with more a step takes longer than its launches

Results = tuple[torch.Tensor, ...]
Step = Callable[[], Results]
Record = Callable[[Step], tuple[Callable[[], object], Results]]
"""From a step to what plays it again, and the tensors in which that leaves the step's results."""


def recorder(device: torch.device) -> Record:
    """How steps are recorded on a CUDA device. One is played at a time, so all share their scratch memory."""
    pool = torch.cuda.graph_pool_handle()

    def record(step: Step) -> tuple[Callable[[], object], Results]:
        graph = torch.cuda.CUDAGraph()
        # Thread-local: NCCL's own threads may ask the device for news meanwhile.
        with torch.cuda.device(device), torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            results = step()
        return graph.replay, results

    return record


def rows_for(n: int) -> int:
    """The least of 1, 2, 3, 4, 6, 8, 12, 16, 24 … that is at least n."""
    power: int = 2 ** (n - 1).bit_length()
    return 3 * power // 4 if power >= 4 and n <= 3 * power // 4 else power


def stop_for(n: int) -> int:
    """The least of SHORT, 4 SHORT, 16 SHORT … that is at least n: attention over more keys has more programs."""
    stop = SHORT
    while stop < n:
        stop *= 4
    return stop


class Seats:
    """The numbers of a batch of so many rows, of one token each, where a recording reads them: one copy fills them."""

    def __init__(self, rows: int, stop: int, device: torch.device) -> None:
        self._rows, self._width = rows, -(-stop // PAGE_SIZE)
        of_tokens, of_spans = 4 * rows, rows * (self._width + 2)  # of eight bytes, and of four
        size = of_tokens + -(-of_spans // 2)
        self._there = torch.zeros(size, dtype=torch.int64, device=device)
        self._here = torch.zeros(size, dtype=torch.int64, pin_memory=device.type == "cuda")
        self._copied = torch.cuda.Event() if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self._tokens, self._tables, self._ends = self._parts(self._here)
        tokens, tables, ends = self._parts(self._there)
        a, b, c, d = tokens.unbind()
        starts, counts = ends.unbind()
        self.batch = Batch(a, b, c, d, (), tables, starts, counts, stop)

    def _parts(self, numbers: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """What Laid has in a row: [4, rows] int64, tables [rows, width] and [2, rows] int32."""
        tokens, spans = numbers[: 4 * self._rows], numbers[4 * self._rows :].view(torch.int32)
        end = self._rows * self._width
        ends = spans[end : end + 2 * self._rows]
        return tokens.view(4, -1), spans[:end].view(self._rows, -1), ends.view(2, -1)

    def take(self, laid: Laid, tokens: torch.Tensor | None = None) -> None:
        """Fill them with a batch, its last row standing for those it lacks. `tokens` of the device replace its own."""
        n, width = laid.n, laid.width
        if self._copied is not None:
            self._copied.synchronize()  # the copy before this one has been made
        of_spans = torch.frombuffer(laid.of_spans, dtype=torch.int32)
        tables, ends = of_spans[: n * width], of_spans[n * width :]
        for ours, theirs in (
            (self._tokens.T, torch.frombuffer(laid.of_tokens, dtype=torch.int64).view(4, n).T),
            (self._tables[:, :width], tables.view(n, width)),
            (self._ends.T, ends.view(2, n).T),
        ):
            ours[:n] = theirs
            if n < self._rows:
                ours[n:] = theirs[-1]
        self._there.copy_(self._here, non_blocking=True)
        if self._copied is not None:
            self._copied.record()
        if tokens is not None:
            self.batch.tokens[:n].copy_(tokens)
            if n < self._rows:
                self.batch.tokens[n:].copy_(tokens[-1:].expand(self._rows - n))


@dataclass(frozen=True)
class Recording:
    """`plays`, in turn, run the pass over the batch in `seats`, and leave `results`, a row for each of its rows."""

    seats: Seats
    plays: tuple[Callable[[], object], ...]
    results: Results


class Recordings:
    """Recorded passes, for batches of up to `most` sequences of up to `max_seq_len` tokens.

    A pass is `begin` of a batch, and `end` of the batch and what that left: two recordings, since a GPU begins with one
    only when all of it has been handed over. They may not wait for the device, nor look at `Batch.spans`.
    """

    def __init__(
        self,
        begin: Callable[[Batch], Results],
        end: Callable[[Batch, Any], Results],
        record: Record,
        max_seq_len: int,
        device: torch.device,
        most: int = MOST,
    ) -> None:
        self._begin, self._end, self._record, self._most = begin, end, record, most
        self._stop, self._device = max_seq_len, device
        self._made: dict[tuple[int, int], Recording] = {}  # by rows, and what all positions are below
        self._left: Results = ()  # by the recording with most rows
        self._works = True

    def serves(self, laid: Laid) -> bool:
        """Whether such a batch is played: each sequence has one token, and all of them have room."""
        n = laid.n
        return self._works and n == len(laid.spans) and rows_for(n) <= self._most and laid.stop <= self._stop

    def run(self, laid: Laid, tokens: torch.Tensor | None = None) -> Results:
        """The pass over a batch that is served: [n, ...] each, which the next call may overwrite.

        `tokens` [n]: in place of the batch's.
        """
        rows, stop = rows_for(laid.n), min(stop_for(laid.stop), self._stop)
        found = self._made.get((rows, stop))
        if found is None:
            results = self._record_new(rows, stop, laid, tokens)
        else:
            found.seats.take(laid, tokens)
            for play in found.plays:
                play()
            results = found.results
        return tuple(result[: laid.n] for result in results)

    def _record_new(self, rows: int, stop: int, laid: Laid, tokens: torch.Tensor | None) -> Results:
        """The pass over a batch, and the recordings for those like it."""
        seats = Seats(rows, stop, self._device)
        seats.take(laid, tokens)
        # First as it is: kernels are compiled, and memory is found, before it is recorded.
        results = self._end(seats.batch, self._begin(seats.batch))
        try:
            play, between = self._record(lambda: self._begin(seats.batch))
            kept = self._room(results)
            then, left = self._record(lambda: _keep(self._end(seats.batch, between), kept))
            self._made[rows, stop] = Recording(seats, (play, then), left)
        except RuntimeError as err:
            self._works = False
            log.info("steps are launched kernel by kernel: recording one failed: %s", str(err).splitlines()[0][:300])
        return results

    def _room(self, results: Results) -> Results:
        """Where results like these are left: logits are large, and all recordings have one place for them."""
        rows = len(results[0])
        if not self._left or len(self._left[0]) < rows:
            self._left = tuple(map(torch.empty_like, results))
        return tuple(left[:rows] for left in self._left)


def _keep(results: Results, kept: Results) -> Results:
    for ours, theirs in zip(kept, results, strict=True):
        ours.copy_(theirs)
    return kept
