"""Questions to the store: several threads ask at once, and a store that does not answer is asked no more."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from llama_dist.parallel import asking
from llama_dist.parallel.asking import Asker


class Slow:
    """A store that takes its time, and notes whether two questions ever met."""

    def __init__(self, seconds: float) -> None:
        self.seconds, self.inside, self.met, self.asked = seconds, 0, False, 0

    def clone(self) -> Slow:
        return self

    def set_timeout(self, limit: Any) -> None:
        pass

    def answer(self, value: int) -> int:
        self.asked += 1
        self.inside += 1
        self.met |= self.inside > 1
        time.sleep(self.seconds)
        self.inside -= 1
        return value


def test_threads_wait_for_their_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(asking, "ANSWER", 60.0)  # longer than any stall
    store = Slow(0.002)
    asker = Asker(store)  # type: ignore[arg-type]
    with ThreadPoolExecutor(8) as pool:
        asked = [pool.submit(asker.ask, lambda s, i=i: s.answer(i), -1) for i in range(200)]
        assert [a.result() for a in asked] == list(range(200))
    assert not store.met


def test_a_silent_store_is_not_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(asking, "ANSWER", 0.05)
    store, free = Slow(0), threading.Event()
    asker = Asker(store)  # type: ignore[arg-type]
    assert asker.ask(lambda s: free.wait() and 1, -1) == -1 and asker.frozen
    assert asker.ask(lambda s: s.answer(2), -1) == -1 and store.asked == 0
    free.set()
    while asker.frozen:
        time.sleep(0.01)
    monkeypatch.setattr(asking, "ANSWER", 60.0)  # a stall is no silence
    assert asker.ask(lambda s: s.answer(3), -1) == 3
