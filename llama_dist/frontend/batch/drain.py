"""When to stop taking lines on: a signal that asks for it, or a deadline."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Mapping

from llama_dist.errors import ConfigError

SLURM_MARGIN = 15.0  # seconds before the end Slurm set that are for flushing and leaving, beyond the grace


def seconds_left(asked: float | None, grace: float, env: Mapping[str, str] = os.environ) -> float | None:
    """Seconds until lines are no longer taken on: those asked for, or what leaves room for the grace before Slurm ends
    the job. None: no deadline.
    """
    if asked is not None:
        return asked
    text = env.get("SLURM_JOB_END_TIME")
    if not text:
        return None
    try:
        end = float(text)
    except ValueError:
        raise ConfigError(f"SLURM_JOB_END_TIME is {text!r}, must be seconds since 1970; give --deadline") from None
    return max(0.0, end - time.time() - grace - SLURM_MARGIN)


class Drain:
    """`due`: take no line on any more. `over`: what runs has had its grace. Asked on one rank of a replica only."""

    def __init__(
        self,
        draining: threading.Event,
        left: float | None,
        grace: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._draining, self._grace, self._clock = draining, grace, clock
        self._deadline = None if left is None else clock() + left
        self._since: float | None = None

    def due(self) -> bool:
        now = self._clock()
        if self._since is None and (self._draining.is_set() or (self._deadline is not None and now >= self._deadline)):
            self._since = now
        return self._since is not None

    def over(self) -> bool:
        return self.due() and self._since is not None and self._clock() - self._since >= self._grace
