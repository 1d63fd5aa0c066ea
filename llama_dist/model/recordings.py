"""Passes of one token a sequence, recorded once on a GPU and played again: a launch for a step instead of one a kernel.

A recording has its own number of rows, so a batch is filled up with copies of its last row, which compute and write
what that row does; recordings are made for numbers that leave at most a third of the rows to copies.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

import torch

from llama_dist.model.cache import PAGE_SIZE, Batch

log = logging.getLogger("llama_dist")

MOST = 256  # rows; with more a step takes longer than its launches

Step = Callable[[], torch.Tensor]
Record = Callable[[Step], tuple[Callable[[], object], torch.Tensor]]
"""From a step to what plays it again, and the tensor in which that leaves the step's result."""


def recorder(device: torch.device) -> Record:
    """How steps are recorded on a CUDA device. One is played at a time, so all share their scratch memory."""
    pool = torch.cuda.graph_pool_handle()

    def record(step: Step) -> tuple[Callable[[], object], torch.Tensor]:
        graph = torch.cuda.CUDAGraph()
        # Thread-local: NCCL's own threads may ask the device for news meanwhile.
        with torch.cuda.device(device), torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            result = step()
        return graph.replay, result

    return record


def rows_for(n: int) -> int:
    """The least of 1, 2, 3, 4, 6, 8, 12, 16, 24 … that is at least n."""
    power: int = 2 ** (n - 1).bit_length()
    return 3 * power // 4 if power >= 4 and n <= 3 * power // 4 else power


@dataclass(frozen=True)
class Recording:
    """`play` runs the pass over the tokens in `batch`, and leaves `hidden` [rows, dim]."""

    batch: Batch
    play: Callable[[], object]
    hidden: torch.Tensor


class Recordings:
    """Recorded passes of `forward`, for batches of up to `most` sequences of up to `max_seq_len` tokens.

    `forward` may not wait for the device, nor look at `Batch.spans`.
    """

    def __init__(
        self,
        forward: Callable[[Batch], torch.Tensor],
        record: Record,
        max_seq_len: int,
        device: torch.device,
        most: int = MOST,
    ) -> None:
        self._forward, self._record, self._most = forward, record, most
        self._stop = max_seq_len
        width = -(-max_seq_len // PAGE_SIZE)
        # One place for the tokens of all recordings: they read it from addresses that do not change.
        self._of_tokens = torch.zeros(4, most, dtype=torch.int64, device=device)
        self._of_spans = torch.zeros(2, most, dtype=torch.int32, device=device)
        self._tables = torch.zeros(most, width, dtype=torch.int32, device=device)
        self._made: dict[int, Recording] = {}
        self._works = True

    def serves(self, batch: Batch) -> bool:
        """Whether such a batch is played: each sequence has one token, and all of them have room."""
        n = len(batch.tokens)
        return self._works and n == len(batch.spans) and rows_for(n) <= self._most and batch.stop <= self._stop

    def run(self, batch: Batch) -> torch.Tensor:
        """`forward` of a batch that is served: [n, dim], which the next call may overwrite."""
        n = len(batch.tokens)
        rows = rows_for(n)
        self._take(batch, rows)
        found = self._made.get(rows)
        if found is not None:
            found.play()
            return found.hidden[:n]
        held = self._held(rows)
        hidden = self._forward(held)  # first as it is: kernels are compiled, and memory is found, before it is recorded
        try:
            self._made[rows] = Recording(held, *self._record(lambda: self._forward(held)))
        except RuntimeError as err:
            self._works = False
            log.info("steps are launched kernel by kernel: recording one failed: %s", str(err).splitlines()[0][:300])
        return hidden[:n]

    def _take(self, batch: Batch, rows: int) -> None:
        n = len(batch.tokens)
        width = batch.tables.shape[1]
        for ours, theirs in (
            *zip(self._of_tokens, (batch.tokens, batch.positions, batch.lengths, batch.slots), strict=True),
            *zip(self._of_spans, (batch.starts, batch.counts), strict=True),
            (self._tables[:, :width], batch.tables),
        ):
            ours[:n] = theirs
            ours[n:rows] = theirs[-1]

    def _held(self, rows: int) -> Batch:
        """The batch of that many rows which recordings read."""
        tokens, positions, lengths, slots = self._of_tokens[:, :rows].unbind()
        starts, counts = self._of_spans[:, :rows].unbind()
        return Batch(tokens, positions, lengths, slots, (), self._tables[:rows], starts, counts, self._stop)
