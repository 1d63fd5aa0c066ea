"""Between the files and the engine: lines go out as requests, completions come in and leave as records."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from llama_dist.engine.stats import EngineStats
from llama_dist.errors import RequestError
from llama_dist.frontend.batch.drain import Drain
from llama_dist.frontend.batch.lines import Line, LineError, custom_id_of, parse_line, requests_of
from llama_dist.frontend.batch.outfile import Sink
from llama_dist.frontend.batch.prompts import Encoder
from llama_dist.frontend.batch.results import Names, count_new, failure, success
from llama_dist.frontend.batch.survey import REPEATED, Survey
from llama_dist.frontend.tally import Finished
from llama_dist.request import Completion, Request, Stop

FLUSH_SECONDS = 0.25  # records wait so long for others, since each sync takes the disk milliseconds
FLUSH_BYTES = 1 << 20
FEED_SECONDS = 0.25  # reading lines may hold up a tick so long
WAIT_SECONDS = 0.1  # between two looks for lines of an engine that has nothing to do
END = (0, b"")

Watch = Callable[[EngineStats, Sequence[Finished]], None]


@dataclass
class Open:
    """A line whose answers are being computed."""

    line: Line
    began: float
    completions: dict[int, Completion] = field(default_factory=dict)


class Desk:
    """One replica's lines in flight, at most about `ahead` requests. `watch` hears of every tick, and of lines when
    their records are on disk. `lines` may give None: there are none now, but there may be."""

    def __init__(
        self,
        survey: Survey,
        lines: Iterator[tuple[int, bytes] | None],
        encoder: Encoder,
        names: Names,
        seed: int,
        sink: Sink,
        ahead: int,
        drain: Drain,
        validate: Callable[[Request], None],
        watch: Watch,
    ) -> None:
        self._survey, self._lines, self._encoder, self._names, self._seed = survey, lines, encoder, names, seed
        self._sink, self._ahead, self._drain = sink, ahead, drain
        self._validate, self._watch = validate, watch
        self._open: dict[int, Open] = {}
        self._in_flight = 0
        self._ended = False  # no more lines are taken on
        self._left = True  # lines that are not
        self._stopped = False
        self._buffer = bytearray()
        self._waiting: list[Finished] = []  # for their records to reach the disk
        self._finished: list[Finished] = []  # since the last tick
        self._flushed = time.monotonic()
        self.written = 0
        """Lines whose record is on disk."""

    @property
    def complete(self) -> bool:
        """Whether all lines were taken on, and every one has its record on disk."""
        return not (self._left or self._in_flight or self._buffer)

    def inbox(self, idle: bool) -> list[Request | Stop]:
        """What the engine is to take on now; a Stop at the end."""
        if self._stopped:
            return []
        if self._drain.due() or self._sink.gone:
            self._ended = True
        requests: list[Request | Stop] = []
        until = time.monotonic() + FEED_SECONDS
        while not self._ended and self._in_flight < self._ahead and time.monotonic() < until:
            line = next(self._lines, END)
            if line is None:
                if idle and not requests:
                    time.sleep(WAIT_SECONDS)
                break
            if line == END:
                self._ended, self._left = True, False
            else:
                requests += self._take(*line)
        cancel = self._in_flight > 0 and (self._drain.over() or self._sink.gone)
        if self._ended and (cancel or not self._in_flight):
            self._stopped = True
            requests.append(Stop(cancel))
        return requests

    def _take(self, number: int, raw: bytes) -> list[Request]:
        """The requests of a line; none where it has an error, which then is its record."""
        custom_id = custom_id_of(raw, number)
        try:
            if self._survey.marks[number] == REPEATED:
                first = self._survey.first_of(number)
                raise LineError("duplicate_custom_id", f"custom_id {custom_id[:80]!r} is on line {first} already")
            line = parse_line(raw, number, self._encoder)
            requests = requests_of(line, self._seed)
            try:
                self._validate(requests[0])
            except RequestError as err:
                raise LineError("invalid_request", str(err)) from None
        except LineError as err:
            self._record(failure(self._names, number, custom_id, err.code, str(err)), Finished(0, 0, 0.0, False))
            return []
        self._open[number] = Open(line, time.monotonic())
        self._in_flight += len(requests)
        return requests

    def outbox(self, completions: Sequence[Completion], stats: EngineStats) -> None:
        """Take in what has ended; what is due goes to disk."""
        for completion in completions:
            self._in_flight -= 1
            number, _, index = completion.request_id.partition(".")
            if completion.finish_reason == "cancelled":  # its line stays to be done
                self._open.pop(int(number), None)
                self._left = True
            elif int(number) in self._open:
                self._open[int(number)].completions[int(index)] = completion
                self._close(int(number))
        waited = time.monotonic() - self._flushed
        if len(self._buffer) >= FLUSH_BYTES or waited >= FLUSH_SECONDS or (self._ended and not self._in_flight):
            self.flush()
        self._watch(stats, self._finished)
        self._finished = []

    def _close(self, number: int) -> None:
        """Make the line's record, if all its answers are there."""
        entry = self._open[number]
        line = entry.line
        if len(entry.completions) < line.settings.n:
            return
        del self._open[number]
        completions = [entry.completions[k] for k in range(line.settings.n)]
        error = next((c.error for c in completions if c.finish_reason == "error"), None)
        seconds = time.monotonic() - entry.began
        if error is not None:
            record = failure(self._names, number, line.custom_id, "server_error", error)
            self._record(record, Finished(len(line.prompt), 0, seconds, False))
        else:
            new = count_new(line, completions)
            record = success(self._names, line, completions, self._encoder.tokenizer)
            self._record(record, Finished(len(line.prompt), new, seconds, True))

    def _record(self, record: bytes, finished: Finished) -> None:
        self._buffer += record
        self._waiting.append(finished)
        if len(self._buffer) >= FLUSH_BYTES:
            self.flush()

    def flush(self) -> None:
        """Put the records that wait to disk."""
        if self._buffer:
            self._sink.append(self._buffer)
            self._buffer = bytearray()
            self.written += len(self._waiting)
            self._finished += self._waiting
            self._waiting = []
        self._flushed = time.monotonic()
