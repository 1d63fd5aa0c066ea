"""Where a job stands, for whoever watches: a bar on a terminal, a line now and then in a log."""

from __future__ import annotations

import logging
import sys
from contextlib import ExitStack
from dataclasses import dataclass

from tqdm import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from llama_dist.frontend.numbers import show_duration, show_number, show_share, show_short

log = logging.getLogger("llama_dist")

REFRESH = 0.2  # seconds between two drawings of the bar


@dataclass(frozen=True)
class Standing:
    """A job at a moment. Tokens a second of the last seconds; `kv` the share of KV pages held; `left` in seconds."""

    done: int
    failed: int
    total: int | None
    running: int
    waiting: int
    prompt_rate: float
    new_rate: float
    kv: float
    left: float | None

    @property
    def sentence(self) -> str:
        total = "" if self.total is None else f"/{self.total:,}"
        return (
            f"{self.done:,}{total} done{f' ({self.failed:,} failed)' if self.failed else ''}, "
            f"running {self.running:,}, waiting {self.waiting:,}, "
            f"{show_number(self.prompt_rate)} prompt and {show_number(self.new_rate)} new tokens/s, "
            f"KV cache {show_share(self.kv)}{'' if self.left is None else f', {show_duration(self.left)} left'}"
        )

    @property
    def short(self) -> str:
        """What stands behind a bar in 80 columns, the dearest first."""
        return (
            f"{'' if self.left is None else f'{show_duration(self.left)} left, '}"
            f"run {self.running}, wait {self.waiting}, "
            f"in {show_short(self.prompt_rate)} out {show_short(self.new_rate)} tok/s, KV {100 * self.kv:.0f}%"
            f"{f', {self.failed} failed' if self.failed else ''}"
        )


class Bar:
    """On a terminal."""

    every = REFRESH

    def __init__(self, standing: Standing) -> None:
        counts = "{n_fmt}/{total_fmt}" if standing.total is not None else "{n_fmt} done"
        gauge = "{percentage:3.0f}%|{bar}| " if standing.total is not None else ""
        self._bar = tqdm(
            desc=standing.short,
            total=standing.total,
            initial=standing.done,
            bar_format=f"{gauge}{counts} {{desc}}",
            dynamic_ncols=True,
            file=sys.stderr,
        )
        self._logs = ExitStack()
        self._logs.enter_context(logging_redirect_tqdm([log]))  # log lines go above the bar, not into it

    def show(self, standing: Standing) -> None:
        self._bar.n = standing.done
        self._bar.total = standing.total
        self._bar.set_description_str(standing.short, refresh=True)

    def close(self, standing: Standing) -> None:
        self.show(standing)
        self._logs.close()
        self._bar.close()


class Lines:
    """In a log: one every so many seconds; none where that is 0."""

    def __init__(self, every: float) -> None:
        self.every = every if every > 0 else float("inf")

    def show(self, standing: Standing) -> None:
        log.info("%s", standing.sentence)

    def close(self, standing: Standing) -> None:
        """Nothing: the summary follows."""


def progress_for(standing: Standing, log_every: float) -> Bar | Lines:
    """A bar if stderr is a terminal, else lines every `log_every` seconds."""
    return Bar(standing) if sys.stderr.isatty() else Lines(log_every)
