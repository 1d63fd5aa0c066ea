"""Questions to the ranks' store that come back in time: the store may die or freeze with the process that keeps it."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

from torch.distributed import Store  # type: ignore[attr-defined]

log = logging.getLogger("llama_dist")

ANSWER = 2.0  # seconds a question may take
T = TypeVar("T")


class Asker:
    """Asks over a connection of its own, one question at a time. While one is still unanswered no other is asked.

    Several threads may ask; each waits for its turn.
    """

    def __init__(self, store: Store) -> None:
        self._store: Any = store.clone()  # type: ignore[attr-defined]
        self._store.set_timeout(timedelta(seconds=ANSWER))
        self._thread: threading.Thread | None = None
        self._turn = threading.Lock()
        self.gone = False
        """The last question found no store: the process that keeps it has ended."""

    @property
    def frozen(self) -> bool:
        """The store has not answered the last question yet, though its time is over."""
        return self._thread is not None and self._thread.is_alive()

    def ask(self, question: Callable[[Any], T], otherwise: T) -> T:
        """What `question` gets from the store; `otherwise` where there is no answer within ANSWER seconds."""
        if not self._turn.acquire(timeout=ANSWER):
            return otherwise
        try:
            return otherwise if self.frozen else self._ask(question, otherwise)
        finally:
            self._turn.release()

    def _ask(self, question: Callable[[Any], T], otherwise: T) -> T:
        answers: list[T] = []

        def ask() -> None:
            try:
                answers.append(question(self._store))
                self.gone = False
            except RuntimeError as err:
                # That an answer took too long is an error too, yet its store is there.
                self.gone = "timeout" not in str(err).lower() and "timed out" not in str(err)
                log.debug("store: %s", err)

        thread = threading.Thread(target=ask, daemon=True)
        thread.start()
        self._thread = thread
        thread.join(ANSWER)
        return answers[0] if answers else otherwise
