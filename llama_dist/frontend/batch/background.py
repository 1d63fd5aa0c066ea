"""Long work of rank 0 while the other ranks wait for it, without running into the groups' timeout."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Generic, TypeVar

from llama_dist.frontend.inbox import POLL_SECONDS

T = TypeVar("T")


class Background(Generic[T]):
    """Work on a side thread, which calls no collective; to be polled from `next_message`."""

    def __init__(self, work: Callable[[], T]) -> None:
        self._result: list[T] = []
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, args=(work,), name="llama_dist-batch", daemon=True)
        self._thread.start()

    def _run(self, work: Callable[[], T]) -> None:
        try:
            self._result.append(work())
        except BaseException as err:  # raised again where it is polled
            self._error = err

    def poll(self) -> T | None:
        """The result, or None after POLL_SECONDS without one. Raises what the work raised."""
        self._thread.join(POLL_SECONDS)
        if self._error is not None:
            raise self._error
        return self._result[0] if self._result else None
