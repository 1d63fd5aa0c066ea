"""Who of several independent tasks does which block of lines, told by files in one folder. No torch, no collective.

A task is a file `ID.task`, which its owner writes anew every few seconds: its heartbeat. A lease is a hard link
`NAME.lease` to the owner's file: making one is atomic, also on NFS, only one task can, it is whole from the first
moment, and its inode says whose it is. So one heartbeat renews all leases of a task. `NAME.done` says that nobody needs
to do it again. A task that left in order is `ID.left`; one that was given up is `ID.lost`: its leases are anybody's.

No clock of one host is compared with a file's time. A task is lost when its file was seen not to change, look after
look, for as long as it promised at most; or when its process is gone, where that can be seen. A look that comes late,
after the looker was stopped or the file server hung, counts as two at most.

Leases save work; they do not make results right. A task that was given up and wakes joins anew, and a line that two
have answered is merged once.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from llama_dist.errors import LlamaDistError
from llama_dist.frontend.batch.cards import Card, began, is_gone, read_card, space_of_pids

log = logging.getLogger("llama_dist")

BEATS = 5  # heartbeats, and looks at those of others, within a timeout at least
BEAT_MOST, LOOK_MOST = 10.0, 2.0  # seconds between two of them, at most
LOOK_PER_TASK = 0.2  # seconds added for each task, so that thousands of looks do not keep the file server busy


@dataclass
class _Other:
    """Another task as it was seen last. `unmoved`: seconds that its heartbeat was watched to stand still."""

    raw: bytes
    card: Card
    unmoved: float = 0.0


class Leases:
    """One task's place in the folder: claims, heartbeat, and its view of the others, which `look` renews.

    `done` and `taken` (to its owner's inode) hold names; `over`: the folder is gone, so the job has ended. `before`:
    what others had written that is counted already. All but the heartbeat is for one thread.
    """

    def __init__(
        self,
        folder: Path,
        task: str,
        part: str,
        timeout: float,
        before: Mapping[str, tuple[int, int]] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.folder, self.over = folder, False
        self.done: set[str] = set()
        self.taken: dict[str, int] = {}
        self._held: set[str] = set()
        self._ended: dict[int, str] = {}  # inode of each task that left or is lost, to the part it wrote
        self._fresh_parts: list[str] = []
        self._others: dict[str, _Other] = {}
        self._counted = dict(before or {})
        self._news = [0, 0]
        self._clock, self._every = clock, min(timeout / BEATS, LOOK_MOST)
        self._looked, self._due = clock(), clock()
        pid = os.getpid()
        self._card = Card(task, socket.gethostname(), space_of_pids(), pid, began(pid), part, timeout)
        self._tally = [0, 0]
        self._mutex = threading.Lock()
        self._join()
        self._stop = threading.Event()
        self._heart = threading.Thread(target=self._beats, name="llama_dist-leases", daemon=True)
        self._heart.start()

    # ---- this task's own file

    def _join(self) -> None:
        self._id = f"t{os.urandom(8).hex()}"
        self._file = self.folder / f"{self._id}.task"
        self._inode = -1
        self._held.clear()
        with self._mutex:
            self._card = replace(self._card, written=0, failed=0)
            try:
                new = self._file.with_suffix(".new")
                new.write_bytes(self._card.text())
                self._inode = os.stat(new).st_ino
                os.rename(new, self._file)
            except OSError as err:
                self._fails(err)

    def _beats(self) -> None:
        while not self._stop.wait(min(self._card.timeout / BEATS, BEAT_MOST)):
            self._beat()

    def _beat(self) -> None:
        with self._mutex:
            self._card = replace(self._card, beat=self._card.beat + 1)
            # No file: given up by the others, or the job is over; the next look finds out.
            with contextlib.suppress(OSError):
                fd = os.open(self._file, os.O_WRONLY | os.O_CLOEXEC)
                try:
                    os.pwrite(fd, self._card.text(), 0)
                finally:
                    os.close(fd)

    def count(self, written: int, failed: int) -> None:
        """So many more records are on disk; the next heartbeat tells the others."""
        with self._mutex:
            card = self._card
            self._card = replace(card, written=card.written + written, failed=card.failed + failed)

    def _fails(self, err: OSError) -> None:
        """What an error in the folder means: the job is over where the folder is gone, else it is raised."""
        if err.errno in (errno.ENOENT, errno.ESTALE) and not self.folder.is_dir():
            self.over = True
            return
        if err.errno in (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK):
            raise LlamaDistError(f"{self.folder}: no hard link can be made here ({err.strerror})") from None
        raise LlamaDistError(
            f"cannot write {self.folder}: {err.strerror}; the results written before it stand"
        ) from None

    def _link(self, name: str) -> bool:
        """Link this task's file to `name`; whether it was there before nobody else's."""
        path = self.folder / name
        for _ in range(3):
            try:
                os.link(self._file, path)
                return True
            except FileExistsError:  # an NFS server that was asked twice says so of our own too
                with contextlib.suppress(OSError):
                    return os.stat(path).st_ino == self._inode
                return False
            except OSError as err:
                if err.errno not in (errno.ENOENT, errno.ESTALE) or not self.folder.is_dir():
                    self._fails(err)
                    return False
                self._join()  # the others had given this task up
        return False

    def _drop(self, name: str) -> None:
        if self.holds(name):
            with contextlib.suppress(OSError):
                os.unlink(self.folder / f"{name}.lease")
        self._held.discard(name)

    # ---- names

    def free(self, name: str) -> bool:
        """Whether it was there to be claimed when this task looked last."""
        owner = self.taken.get(name)
        return name not in self.done and name not in self._held and (owner is None or owner in self._ended)

    def claim(self, name: str) -> bool:
        """Take a lease that nobody has, or that a task had which is gone. False: another has it, or it is done."""
        if not self.free(name):
            return False
        owner = self.taken.get(name)
        if owner is not None and not self._clear(name, owner):
            return False
        if not self._link(f"{name}.lease"):
            self.taken[name] = -1  # whose, the next look tells
            return False
        self._held.add(name)
        self.taken[name] = self._inode
        if (self.folder / f"{name}.done").exists():  # since the last look
            self.done.add(name)
            self._drop(name)
            return False
        return True

    def _clear(self, name: str, owner: int) -> bool:
        """Take away the lease of a task that is gone. Only one can; a lease that is not the one meant is put back."""
        path, grave = self.folder / f"{name}.lease", self.folder / f"{name}.{self._id}.old"
        try:
            os.rename(path, grave)
            meant = os.stat(grave).st_ino == owner
            if not meant:
                with contextlib.suppress(FileExistsError):
                    os.link(grave, path)
                if (self.folder / f"{name}.done").exists():  # meanwhile: its owner found no lease to take away
                    with contextlib.suppress(FileNotFoundError):
                        os.unlink(path)
            os.unlink(grave)
        except OSError:
            meant = False  # another was faster
        if not meant:
            self.taken[name] = -1
        return meant

    def holds(self, name: str) -> bool:
        """Whether the lease is this task's, asked anew."""
        with contextlib.suppress(OSError):
            return os.stat(self.folder / f"{name}.lease").st_ino == self._inode
        return False

    def finish(self, name: str) -> None:
        """Its results are on disk."""
        self._link(f"{name}.done")
        self._drop(name)
        self.done.add(name)

    def leave(self) -> None:
        """Give back all leases, and say that this task has left."""
        self._stop.set()
        self._heart.join(BEAT_MOST)  # a file server that hangs must not keep this task
        self._beat()
        with contextlib.suppress(OSError):
            os.rename(self._file, self._file.with_suffix(".left"))
        for name in sorted(self._held):
            self._drop(name)

    # ---- the others

    def look(self) -> None:
        """Renew the view, where that is due; give up tasks that show no life."""
        now = self._clock()
        if now < self._due or self.over:
            return
        watched = min(now - self._looked, 2 * self._every)
        try:
            with os.scandir(self.folder) as entries:
                names = {entry.name: entry.inode() for entry in entries}
        except OSError as err:
            self._fails(err)
            return
        self.done = {name.removesuffix(".done") for name in names if name.endswith(".done")}
        self.taken = {name.removesuffix(".lease"): i for name, i in names.items() if name.endswith(".lease")}
        n_tasks = 0
        for name, inode in names.items():
            stem, _, kind = name.rpartition(".")
            if kind == "task" and stem != self._id:
                n_tasks += 1
                self._watch(stem, inode, watched)
            elif kind in ("left", "lost") and inode not in self._ended:
                self._end(stem, inode, name)
        if self._file.name not in names and not self._file.exists():
            log.warning("the other tasks had given this one up: no sign of it for a while; it goes on as a new one")
            self._join()
        self._every = max(min(self._card.timeout / BEATS, LOOK_MOST), LOOK_PER_TASK * n_tasks)
        self._looked, self._due = now, self._clock() + self._every

    def _watch(self, stem: str, inode: int, seconds: float) -> None:
        path = self.folder / f"{stem}.task"
        try:
            raw, card = read_card(path)
        except OSError:  # it has left since
            return
        seen = self._others.get(stem)
        if card is None:
            return
        self._note(stem, card)
        if seen is None or raw != seen.raw:
            seen = self._others[stem] = _Other(raw, card)
        else:
            seen.unmoved += seconds
        gone = is_gone(card, self._card.space)
        if not gone and seen.unmoved < max(card.timeout, self._card.timeout):
            return
        lost = path.with_suffix(".lost")
        with contextlib.suppress(OSError):  # another was faster
            os.rename(path, lost)
            why = "its process is gone" if gone else f"no sign of life for {seen.unmoved:.0f} s"
            log.warning("task %s (host %s, pid %d) is lost: %s", card.task, card.host, card.pid, why)
        self._end(stem, inode, lost.name)

    def _end(self, stem: str, inode: int, name: str) -> None:
        self._ended[inode] = stem
        self._others.pop(stem, None)
        with contextlib.suppress(OSError):
            card = read_card(self.folder / name)[1]
            if card is not None and card.part != self._card.part:  # else it was this task, before it was given up
                self._note(stem, card)
                self._fresh_parts += [card.part] if card.part else []

    def _note(self, stem: str, card: Card) -> None:
        before = self._counted.get(stem, (0, 0))
        self._counted[stem] = card.written, card.failed
        self._news[0] += card.written - before[0]
        self._news[1] += card.failed - before[1]

    def news(self) -> tuple[int, int]:
        """Records that other tasks have written since the last call, and how many of them are errors."""
        found = self._news[0], self._news[1]
        self._news = [0, 0]
        return found

    def ended_parts(self) -> list[str]:
        """Names of the parts of tasks that have ended since the last call: they may hold lines of blocks not done."""
        found, self._fresh_parts = self._fresh_parts, []
        return found
