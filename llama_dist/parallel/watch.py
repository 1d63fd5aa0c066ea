"""Noticing that a peer died, that a signal came, or that this rank failed; ending with one line that says so.

A gloo collective with a dead peer fails with an address or not at all, and a Python signal handler does not run while
the main thread is inside a collective. So one side thread a process waits on a wake-up pipe, which the C-level signal
handler writes to at once, and on a pidfd of every rank of this host. It calls no collective; what ranks have to tell
each other of life and death stands on a board in the store (board.py).
"""

from __future__ import annotations

import ctypes
import json
import logging
import os
import select
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass
from types import TracebackType
from typing import NoReturn

from torch.distributed import Store  # type: ignore[attr-defined]

from llama_dist.errors import LlamaDistError, PeerLost
from llama_dist.parallel.board import Board
from llama_dist.parallel.launch import Launch, read_launch

log = logging.getLogger("llama_dist")

BEAT = 1.0  # seconds between two heartbeats
SILENT = 2.5  # seconds without one after which a rank counts as stuck, once a collective has failed
LOST_HOST = 30.0  # the least of it for ranks of other hosts while nothing has failed yet; else the timeout
GRACE = 2.0  # seconds the main thread has to notice a lost peer by itself and say so
PR_SET_PDEATHSIG = 1
KEEP_STORE = 2.5  # seconds for which a failed rank that keeps the store lets the others read why
LEAVE = 10.0  # seconds for which it waits for the others where all leave in order
EX_TEMPFAIL = 75  # sysexits.h: run me again


@dataclass(frozen=True)
class Card:
    """Where a rank runs. Pids compare only within one `space`: a boot of a host and a pid namespace."""

    rank: int
    host: str
    pid: int
    space: str

    def __str__(self) -> str:
        return f"rank {self.rank} (host {self.host}, pid {self.pid})"


def my_card(rank: int) -> Card:
    """This process's own."""
    try:
        with open("/proc/sys/kernel/random/boot_id") as f:
            space = f"{f.read().strip()}/{os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:
        space = f"{socket.gethostname()}/{rank}"
    return Card(rank, socket.gethostname(), os.getpid(), space)


def _say(text: str) -> None:
    sys.stderr.write(f"llama_dist: error: {text}\n")
    sys.stderr.flush()


class Watch:
    """The side thread and what it knows. One a process, because signals and pids are the process's."""

    _current: Watch | None = None

    def __init__(self, rank: int) -> None:
        self.rank = rank
        self.lost: PeerLost | None = None
        self._cards: list[Card] = []
        self._board: Board | None = None
        self._leaving = False
        self._finishing = threading.Lock()
        self._pidfds: dict[int, int] = {}
        self._poll = select.poll()
        self._wake_read, self._wake_write = os.pipe()
        os.set_blocking(self._wake_write, False)
        self._poll.register(self._wake_read, select.POLLIN)
        self._guarded = False
        self._victim: int | None = None  # the rank whose death this rank noticed first
        self._told = False  # another rank has said why the job ends
        self._keeps_store = self._posted = False
        self._stuck: frozenset[int] = frozenset()
        self._parent: int | None = None  # torchrun, where it started this rank
        self._patience = LOST_HOST
        self._drains = False
        self.draining = threading.Event()
        self._last_words: Callable[[str, int], None] | None = None
        self._wakers: list[Callable[[], None]] = []
        Watch._current = self
        threading.Thread(target=self._loop, name="llama_dist-watch", daemon=True).start()

    @staticmethod
    def current() -> Watch | None:
        return Watch._current

    # ---- set-up, on the main thread

    def catch_signals(self) -> None:
        """SIGINT and SIGTERM end the job with one line, also while the main thread is inside a collective."""
        self._guarded = True
        if threading.current_thread() is not threading.main_thread():
            return
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: None)  # the wake-up byte is written before any Python code runs
        signal.set_wakeup_fd(self._wake_write, warn_on_full_buffer=False)

    def drain_on_signals(self) -> None:
        """From here on SIGTERM and SIGUSR1 set `draining`, on every rank within a beat, and the job ends when it may.

        A second SIGTERM ends it at once. Either way the exit code is to be 75.
        """
        self._drains = True
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGUSR1, lambda *_: None)

    def at_finish(self, last_words: Callable[[str, int], None]) -> None:
        """Call this with message and exit code where the job ends by failure, on the one rank that says so."""
        self._last_words = last_words

    def at_loss(self, waker: Callable[[], None]) -> None:
        """Call this on the side thread when a rank is lost, so that the main thread does not wait for it any longer."""
        self._wakers.append(waker)
        if self.lost is not None:
            waker()

    def attach(self, store: Store, launch: Launch, timeout: float) -> None:
        """Exchange cards with the other ranks and start watching them. Call when the default group is up.

        A rank of this host without a heartbeat for `timeout` seconds is stuck, even if nobody waits for it.
        """
        self._patience = timeout
        if launch.launcher == "torchrun":
            self._die_with_parent()
        if launch.size == 1:
            return
        store.set(f"card/{self.rank}", json.dumps(asdict(my_card(self.rank))))
        self._cards = [Card(**json.loads(store.get(f"card/{r}"))) for r in range(launch.size)]
        board = Board(store, self.rank)
        self._keeps_store = self.rank == 0 and not launch.agent_store
        mine = self._cards[self.rank]
        for card in self._cards:
            if card.rank != self.rank and card.space == mine.space:
                try:
                    self._pidfds[os.pidfd_open(card.pid)] = card.rank
                except OSError as err:  # gone already, or a kernel without pidfds: its heartbeat is watched instead
                    log.debug("no pidfd for %s: %s", card, err)
        for fd in self._pidfds:
            self._poll.register(fd, select.POLLIN)
        self._board = board
        if not self._guarded:
            self._hook_exceptions()
        os.write(self._wake_write, b"\0")

    def _die_with_parent(self) -> None:
        self._parent = os.getppid()
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != self._parent:
            os._exit(143)

    def _hook_exceptions(self) -> None:
        before = sys.excepthook

        def hook(kind: type[BaseException], err: BaseException, trace: TracebackType | None) -> None:
            before(kind, err, trace)
            if isinstance(err, Exception):
                self.fail(err, show=False)

        sys.excepthook = hook

    def detach(self) -> None:
        """This rank leaves in order: the others must not take its end for a death.

        The rank that keeps the store goes last, or after LEAVE seconds: a slower one still has to read who left.
        """
        self._leaving = True
        if self._drains and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGUSR1, signal.SIG_IGN)  # Python's own end would take the handler away: a death
        if self._board is not None:
            self._board.leave()
            deadline = time.monotonic() + LEAVE
            everyone = [card.rank for card in self._cards]
            while self._keeps_store and not self._board.all_left(everyone) and time.monotonic() < deadline:
                time.sleep(0.01)
            self._board = None

    # ---- the side thread

    def _loop(self) -> None:
        due = time.monotonic()
        while True:
            for fd, _ in self._poll.poll(BEAT * 1000):
                if fd == self._wake_read:
                    for number in os.read(fd, 64):
                        if number:
                            self._on_signal(number)
                else:
                    self._poll.unregister(fd)
                    self._on_death(self._pidfds[fd])
            if time.monotonic() >= due and self._board is not None:
                due = time.monotonic() + BEAT
                self._on_beat(self._board)

    def _on_signal(self, number: int) -> None:
        orphaned = self._parent is not None and os.getppid() != self._parent
        # torchrun sends SIGTERM to all when the first rank leaves with another code than 0; they all leave together.
        if number == signal.SIGTERM and not orphaned and self._all_leave():
            return
        # It does so too when one rank dies: look for that one before blaming the signal.
        for fd, _ in self._poll.poll(0):
            if fd != self._wake_read:
                self._poll.unregister(fd)
                self._on_death(self._pidfds[fd])
        if self.lost is not None:
            self.finish(str(self.lost), PeerLost.exit_code)
        if orphaned:
            self.finish("the launcher died", 1)
        if self._drains and number in (signal.SIGTERM, signal.SIGUSR1):
            if not self.draining.is_set():
                self._drain()
            elif number == signal.SIGTERM:
                self.finish("stopped by a second SIGTERM", EX_TEMPFAIL)
            return
        self.finish(f"stopped by {signal.Signals(number).name}", 128 + number)

    def _all_leave(self) -> bool:
        return self._leaving or (self._board is not None and self._board.anyone_left([c.rank for c in self._cards]))

    def _drain(self) -> None:
        self.draining.set()
        if self._board is not None:
            self._board.ask_to_drain()

    def _on_death(self, rank: int) -> None:
        board = self._board
        if self._leaving or board is None or board.has_left(rank):
            return
        reported = board.report()
        if self.lost is None:
            self._victim, self._told = rank, reported is not None
        self._lose(reported or f"{self._cards[rank]} died")

    def _on_beat(self, board: Board) -> None:
        board.beat()
        if self._drains and not self.draining.is_set() and board.is_to_drain():
            self.draining.set()
        if self.lost is not None:
            return
        reported = board.report()
        if reported:
            self._told = True
            self._lose(reported, grace=0.1)
            return
        # A stopped process is not dead to its pidfd, and ranks of other hosts have none here.
        bounds = {c.rank: max(self._patience, LOST_HOST) for c in self._cards if c.rank != self.rank}
        bounds.update((rank, self._patience) for rank in self._pidfds.values())
        silences = board.silences(list(bounds))
        silent = [rank for rank, quiet in silences.items() if quiet > bounds[rank] and not board.has_left(rank)]
        if silent:
            self._stuck = frozenset(silent)
            self._lose(f"{self._cards[silent[0]]} does not answer: no heartbeat for {bounds[silent[0]]:g} s")

    def _lose(self, message: str, grace: float = GRACE) -> None:
        if self.lost is not None or self._leaving:
            return
        self.lost = PeerLost(message)
        for wake in self._wakers:
            wake()
        timer = threading.Timer(grace, lambda: None if self._leaving else self.finish(message, PeerLost.exit_code))
        timer.daemon = True
        timer.start()

    # ---- ending

    def _speaks(self, message: str) -> bool:
        """Put this rank's error where all see it. True for the first to do so, who also prints it."""
        if self._board is None:  # the ranks have not met: a signal reached them all
            return self.rank == 0
        if self._told:
            return False
        self._posted = True
        first = self._board.post(message)
        if first is not None:
            return first
        # The store went with the rank that kept it: of this host's survivors the first speaks.
        dead = self._stuck | {self._victim}
        here = [r for r in self._pidfds.values() if r not in dead]
        return not (dead - {None}) or all(r > self.rank for r in here)

    def _await_others(self, seconds: float) -> None:
        """Let the others read why, before the store goes with this rank that keeps it."""
        poll, left = select.poll(), {fd for fd, rank in self._pidfds.items() if rank not in self._stuck}
        for fd in left:
            poll.register(fd, select.POLLIN)
        deadline = time.monotonic() + seconds
        while left and (wait := deadline - time.monotonic()) > 0:
            for fd, _ in poll.poll(wait * 1000):
                poll.unregister(fd)
                left.discard(fd)

    def explain(self, err: PeerLost) -> PeerLost:
        """The failure of a collective, as the rank that caused it: waits for the side thread to know."""
        deadline = time.monotonic() + SILENT + BEAT
        while self.lost is None and self._board is not None and time.monotonic() < deadline:
            time.sleep(0.05)
            silences = self._board.silences([c.rank for c in self._cards if c.rank != self.rank])
            stuck = [self._cards[rank] for rank, quiet in silences.items() if quiet > SILENT]
            if self._board.frozen and not stuck:
                stuck = self._cards[:1]  # the store answers no more: who keeps it is stuck (or torchrun, with all)
            if self._board.gone and self.lost is None and 0 not in self._pidfds.values() and self.rank:
                self._stuck = frozenset({0})
                return PeerLost(f"{self._cards[0]} is gone, and the ranks' store with it ({err})")
            if stuck:
                self._stuck = frozenset(c.rank for c in stuck)
                return PeerLost(f"{stuck[0]} does not answer ({err})")
        return self.lost or err

    def fail(self, err: Exception, show: bool = True) -> int:
        """The end of this rank by an exception: say it once in the job, and take the others along."""
        if isinstance(err, PeerLost):
            err = self.explain(err)
        known = isinstance(err, LlamaDistError)
        if not known and show:
            traceback.print_exception(err)
        message = (str(err) if known else f"{type(err).__name__}: {err}").replace("\n", " ")
        code = err.exit_code if isinstance(err, LlamaDistError) else 1
        if self._board is not None:
            self.finish(message, code)
        _say(message)
        if self._last_words is not None:
            self._last_words(message, code)
        return code

    def finish(self, message: str, code: int) -> NoReturn:
        """Print the line (the first rank to fail does), flush, leave at once: teardown after a lost peer can abort."""
        self._finishing.acquire()  # a second caller waits here until the process ends
        if self._speaks(message):
            _say(f"[rank {self.rank}] {message}" if self._cards else message)
            if self._last_words is not None:
                try:
                    self._last_words(message, code)
                except Exception as err:  # nothing may keep a failed rank from leaving
                    _say(f"at the end: {err}")
        if self._keeps_store and self._posted:
            self._await_others(KEEP_STORE if code != EX_TEMPFAIL else KEEP_STORE / 5)
        flusher = threading.Thread(target=sys.stdout.flush, daemon=True)
        flusher.start()
        flusher.join(1.0)  # the reader of a full pipe may be gone
        os._exit(code)


def guard(main: Callable[[], int]) -> int:
    """Run a program's main function so that its failure, a signal or a peer's death ends every rank with one line."""
    watch = Watch(read_launch().rank)
    watch.catch_signals()
    try:
        return main()
    except Exception as err:
        return watch.fail(err)
