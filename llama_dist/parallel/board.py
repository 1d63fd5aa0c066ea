"""The notice board of a job, kept in the store: heartbeats, who left in order, the first error, the wish to drain.

It is asked by the watch's thread and at a rank's end, never beside a collective; every question has its time and an
answer for silence (asking.py).
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence

from torch.distributed import Store  # type: ignore[attr-defined]

from llama_dist.parallel.asking import Asker


class Board(Asker):
    """This rank's view of the board."""

    def __init__(self, store: Store, rank: int) -> None:
        super().__init__(store)
        self._rank = rank
        self._beats: dict[int, tuple[int, float]] = {}

    def beat(self) -> None:
        """This rank lives."""
        self.ask(lambda store: store.add(f"beat/{self._rank}", 1), 0)

    def silences(self, ranks: Sequence[int]) -> dict[int, float]:
        """Seconds since each rank's heartbeat was last seen to move; 0 when first asked. Empty: the store is silent."""
        nothing: list[int] = []
        counts = self.ask(lambda store: [int(store.add(f"beat/{rank}", 0)) for rank in ranks], nothing)
        now = time.monotonic()
        heard = dict(zip(ranks, counts, strict=False))
        for rank, count in heard.items():
            if rank not in self._beats or self._beats[rank][0] != count:
                self._beats[rank] = (count, now)
        return {rank: now - self._beats[rank][1] for rank in heard}

    def leave(self) -> None:
        """This rank ends in order: its death means nothing."""
        self.ask(lambda store: store.set(f"left/{self._rank}", ""), None)

    def has_left(self, rank: int) -> bool:
        return self.ask(lambda store: bool(store.check([f"left/{rank}"])), False)

    def anyone_left(self, ranks: Sequence[int]) -> bool:
        return self.ask(lambda store: any(store.check([f"left/{rank}"]) for rank in ranks), False)

    def all_left(self, ranks: Sequence[int]) -> bool:
        return self.ask(lambda store: bool(store.check([f"left/{rank}" for rank in ranks])), False)

    def post(self, message: str) -> bool | None:
        """Put up this rank's error. True: it is the job's first. None: the store is gone."""
        mine = json.dumps({"rank": self._rank, "message": message})
        return self.ask(lambda store: bool(store.compare_set("error", "", mine) == mine.encode()), None)

    def report(self) -> str | None:
        """The error another rank put up."""
        text = self.ask(lambda store: store.get("error") if store.check(["error"]) else None, None)
        found = json.loads(text) if text else {"rank": self._rank}
        return None if found["rank"] == self._rank else f"rank {found['rank']}: {found['message']}"

    def ask_to_drain(self) -> None:
        self.ask(lambda store: store.set("drain", ""), None)

    def is_to_drain(self) -> bool:
        return self.ask(lambda store: bool(store.check(["drain"])), False)
