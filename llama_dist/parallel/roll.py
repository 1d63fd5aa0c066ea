"""Steps that ranks take together, in bounded time, though some of them never come, stop or die on the way.

No collective: everything goes through the store, where each rank leaves what it found in a step. Rank 0 waits a while
and tells who came; whoever did not takes part in no later step. So one clock decides, and all ranks go on alike.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch.distributed import PrefixStore, Store  # type: ignore[attr-defined]

from llama_dist.errors import ConfigError, PeerLost
from llama_dist.parallel.asking import ANSWER, Asker
from llama_dist.parallel.watch import Card

LOOK_FIRST, LOOK_MOST = 0.01, 0.2  # seconds between two looks into the store
SLACK = 3.0  # seconds more that the others wait for rank 0's word
EXITING = 4  # a flag of the kernel's, PF_EXITING
MANY = 64  # ranks whose values are asked for at once


class LeftOut(PeerLost):
    """This rank came too late to a step: the others went on without it."""


class Roll:
    """`ranks` take part still; `absent` gives the step that each of the others did not come to."""

    def __init__(self, store: Store, rank: int, size: int) -> None:
        self.store, self.rank, self.size = store, rank, size
        self.ranks = tuple(range(size))
        self.absent: dict[int, str] = {}
        self.at = ""  # the step this rank is in
        self._asker = Asker(PrefixStore("roll", store))

    def enter(self) -> None:
        """ConfigError where another process has come as this rank already."""
        if self._asker.ask(lambda store: int(store.add(f"entered/{self.rank}", 1)), 1) > 1:
            raise ConfigError(
                f"two processes came as rank {self.rank} of {self.size}: give every process its own rank, and every "
                "job its own port"
            )

    def tell(self, name: str, value: Any) -> None:
        text = json.dumps(value)
        self._asker.ask(lambda store: store.set(name, text), None)

    def is_told(self, *names: str) -> bool:
        return self._asker.ask(lambda store: bool(store.check(list(names))), False)

    def hear(self, name: str, seconds: float) -> Any:
        """What was told under `name`; None where nothing was within `seconds`."""
        if not self._await((name,), seconds):
            return None
        text = self._asker.ask(lambda store: store.get(name), None)
        return None if text is None else json.loads(text)

    def _await(self, names: tuple[str, ...], seconds: float) -> bool:
        deadline, pause = time.monotonic() + seconds, LOOK_FIRST
        while not self.is_told(*names):
            if time.monotonic() > deadline or self._asker.gone:
                return False
            time.sleep(pause)
            pause = min(1.5 * pause, LOOK_MOST)
        return True

    def step(self, name: str, value: Any, seconds: float, lag: float) -> None:
        """Leave this rank's value (JSON) and go on with those ranks that come within `seconds` of rank 0.

        Every rank calls it alike. `lag`: seconds by which rank 0 may come after this rank. Raises LeftOut on a rank
        that rank 0 did not wait for, PeerLost where rank 0 tells nothing.
        """
        self.at = name
        self.tell(f"{name}/{self.rank}", value)
        if self.rank == 0:
            self._await(tuple(f"{name}/{rank}" for rank in self.ranks), seconds)
            came = [rank for rank in self.ranks if rank == 0 or self.is_told(f"{name}/{rank}")]
            self.tell(name, came)
        else:
            came = self.hear(name, seconds + lag + SLACK)
            if came is None:
                raise PeerLost(f"rank 0 tells nothing more: the others waited for it at the step {name!r}")
        self.absent.update((rank, name) for rank in self.ranks if rank not in came)
        self.ranks = tuple(came)
        if self.rank not in came:
            raise LeftOut(f"rank {self.rank} was too late for the step {name!r}; the others went on without it")

    def values(self, name: str) -> dict[int, Any]:
        """What the ranks that came to a step left there."""
        found: dict[int, Any] = {}
        for i in range(0, len(self.ranks), MANY):
            found.update(self._some_values(name, self.ranks[i : i + MANY]))
        return found

    def _some_values(self, name: str, ranks: tuple[int, ...]) -> dict[int, Any]:
        nothing: list[bytes] = []
        texts = self._asker.ask(lambda store: store.multi_get([f"{name}/{rank}" for rank in ranks]), nothing)
        return {rank: json.loads(text) for rank, text in zip(ranks, texts, strict=False)}

    def heard_of(self, name: str) -> Iterator[tuple[int, Any]]:
        """Every rank that has left a value at a step, in time or not, with that value."""
        for rank in range(self.size):
            if self.is_told(f"{name}/{rank}"):
                yield from self._some_values(name, (rank,)).items()

    def came_late(self) -> list[int]:
        """Absent ranks that have come to the step since."""
        return [rank for rank, name in sorted(self.absent.items()) if self.is_told(f"{name}/{rank}")]

    def speaks(self) -> bool | None:
        """True on one rank, once: who says what all know. None where the store does not answer."""
        mine, unknown = str(self.rank), None
        return self._asker.ask(lambda store: bool(store.compare_set("speaker", "", mine) == mine.encode()), unknown)

    def end(self, code: int | None, seconds: float) -> int:
        """The exit code, which rank 0 tells, on every rank; rank 0 leaves last, since the store may go with it."""
        if self.rank:
            heard = self.hear("end", seconds)
            self.tell(f"left/{self.rank}", "")
            return 1 if heard is None else int(heard)
        assert code is not None
        self.tell("end", code)
        self._await(tuple(f"left/{rank}" for rank in self.ranks if rank), ANSWER)
        return code


def state_of(card: Card, mine: Card) -> str | None:
    """What a rank of this host does, as the kernel sees it: gone, stopped, blocked or running. None: another host."""
    if card.space != mine.space:
        return None
    try:
        return state_in(Path(f"/proc/{card.pid}/stat").read_text())
    except OSError:
        return "gone"


def state_in(stat: str) -> str:
    """The same from a line of /proc/PID/stat (proc(5)). What is on its way out, which may take a while, is gone."""
    fields = stat.rpartition(")")[2].split()  # from the third field on, the state
    if int(fields[6]) & EXITING:
        return "gone"
    return {"Z": "gone", "X": "gone", "T": "stopped", "t": "stopped", "D": "blocked"}.get(fields[0], "running")
