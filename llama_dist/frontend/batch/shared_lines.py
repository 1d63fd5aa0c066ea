"""The lines that one replica takes of a job that several tasks share, block by block."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

from llama_dist.errors import LlamaDistError
from llama_dist.frontend.batch.blocks import open_blocks
from llama_dist.frontend.batch.leases import Leases
from llama_dist.frontend.batch.outfile import Sink
from llama_dist.frontend.batch.records import read_record
from llama_dist.frontend.batch.sharing import lines_in_block, mark_part
from llama_dist.frontend.batch.survey import REPEATED, TODO, Survey


class SharedLines:
    """Lines of the blocks that this replica holds leases of, and the sink that knows when a block is done.

    As a sink it hands everything on to `inner`. Where the job is over, because others had given this one up and did
    its lines, nobody waits for its results.
    """

    def __init__(self, survey: Survey, output: Path, leases: Leases, inner: Sink) -> None:
        self._survey, self._output, self._leases, self._inner = survey, output, leases, inner
        self._size = lines_in_block(survey.n_lines)
        self._open: dict[int, set[int]] = {}  # held blocks, to their lines that have no record yet

    @property
    def gone(self) -> bool:
        return self._leases.over

    def append(self, data: bytes | bytearray) -> None:
        try:
            self._inner.append(data)
        except LlamaDistError:
            self._leases.look()
            if self._leases.over:
                return
            raise
        found = [read_record(raw) for raw in bytes(data).splitlines(keepends=True)]
        self._leases.count(len(found), sum(record.failed for record in found))
        for record in found:
            block = (record.line - 1) // self._size
            if block in self._open:
                self._open[block].discard(record.line)
                self._close(block)

    def _close(self, block: int) -> None:
        if not self._open[block]:
            del self._open[block]
            self._leases.finish(str(block))

    def close(self) -> None:
        self._inner.close()

    def lines(self) -> Iterator[tuple[int, bytes] | None]:
        """The lines to be done, None where there are none at the moment; ends when all are done, by whomever."""
        leases, marks = self._leases, self._survey.marks
        left: list[int] = open_blocks(marks, self._size).tolist()
        turn = random.randrange(len(left)) if left else 0  # so that tasks seldom try for the same block
        left = left[turn:] + left[:turn]
        at = 0
        while True:
            leases.look()
            for name in leases.ended_parts():
                mark_part(self._output.with_name(name), marks)
            if at >= len(left):
                left, at = [block for block in left if str(block) not in leases.done], 0
            if not left or leases.over:
                return
            while at < len(left) and (left[at] in self._open or not leases.free(str(left[at]))):
                at += 1
            if at >= len(left):
                yield None
                continue
            block, at = left[at], at + 1
            if leases.claim(str(block)):
                yield from self._lines_of(block)

    def _lines_of(self, block: int) -> Iterator[tuple[int, bytes]]:
        first, marks = 1 + block * self._size, self._survey.marks
        last = min(first + self._size, len(marks))
        todo = {number for number in range(first, last) if marks[number] in (TODO, REPEATED)}
        self._open[block] = set(todo)
        self._close(block)
        for number, raw in self._survey.lines(first, last) if todo else ():
            if number in todo:
                yield number, raw
