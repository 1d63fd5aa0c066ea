"""The notice board of a job, kept in the store: heartbeats, who left in order, the first error, the wish to drain.

The store may die or freeze with the rank that keeps it, so every question has its time and an answer for silence; while
one is still unanswered no other is asked. It is asked over a connection of its own, by the watch's thread and at a
rank's end, never beside a collective.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, TypeVar

from torch.distributed import Store  # type: ignore[attr-defined]

log = logging.getLogger("llama_dist")

ANSWER = 2.0  # seconds a question may take; after one that took longer the store is not asked again
T = TypeVar("T")


class Board:
    """This rank's view of the board."""

    def __init__(self, store: Store, rank: int) -> None:
        self._store: Any = store.clone()  # type: ignore[attr-defined]
        self._store.set_timeout(timedelta(seconds=ANSWER))
        self._rank = rank
        self._beats: dict[int, tuple[int, float]] = {}
        self._asker: threading.Thread | None = None
        self.gone = False
        """The last question found no store: the process that keeps it has ended."""

    @property
    def frozen(self) -> bool:
        """The store has not answered the last question yet, though its time is over."""
        return self._asker is not None and self._asker.is_alive()

    def _ask(self, question: Callable[[Any], T], otherwise: T) -> T:
        if self.frozen:
            return otherwise
        answers: list[T] = []

        def ask() -> None:
            try:
                answers.append(question(self._store))
                self.gone = False
            except RuntimeError as err:
                # That an answer took too long is an error too, yet its store is there.
                self.gone = "timeout" not in str(err).lower() and "timed out" not in str(err)
                log.debug("store: %s", err)

        self._asker = threading.Thread(target=ask, daemon=True)
        self._asker.start()
        self._asker.join(ANSWER)
        return answers[0] if answers else otherwise

    def beat(self) -> None:
        """This rank lives."""
        self._ask(lambda store: store.add(f"beat/{self._rank}", 1), 0)

    def silences(self, ranks: Sequence[int]) -> dict[int, float]:
        """Seconds since each rank's heartbeat was last seen to move; 0 when first asked. Empty: the store is silent."""
        nothing: list[int] = []
        counts = self._ask(lambda store: [int(store.add(f"beat/{rank}", 0)) for rank in ranks], nothing)
        now = time.monotonic()
        heard = dict(zip(ranks, counts, strict=False))
        for rank, count in heard.items():
            if rank not in self._beats or self._beats[rank][0] != count:
                self._beats[rank] = (count, now)
        return {rank: now - self._beats[rank][1] for rank in heard}

    def leave(self) -> None:
        """This rank ends in order: its death means nothing."""
        self._ask(lambda store: store.set(f"left/{self._rank}", ""), None)

    def has_left(self, rank: int) -> bool:
        return self._ask(lambda store: bool(store.check([f"left/{rank}"])), False)

    def post(self, message: str) -> bool | None:
        """Put up this rank's error. True: it is the job's first. None: the store is gone."""
        mine = json.dumps({"rank": self._rank, "message": message})
        return self._ask(lambda store: bool(store.compare_set("error", "", mine) == mine.encode()), None)

    def report(self) -> str | None:
        """The error another rank put up."""
        text = self._ask(lambda store: store.get("error") if store.check(["error"]) else None, None)
        found = json.loads(text) if text else {"rank": self._rank}
        return None if found["rank"] == self._rank else f"rank {found['rank']}: {found['message']}"

    def ask_to_drain(self) -> None:
        self._ask(lambda store: store.set("drain", ""), None)

    def is_to_drain(self) -> bool:
        return self._ask(lambda store: bool(store.check(["drain"])), False)
