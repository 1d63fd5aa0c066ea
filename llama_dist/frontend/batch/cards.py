"""What a task that shares its work says of itself in a file, and whether it is alive. No torch."""

from __future__ import annotations

import contextlib
import json
import os
import socket
from dataclasses import asdict, dataclass
from pathlib import Path

CARD_BYTES = 1024  # one write, one block


@dataclass(frozen=True)
class Card:
    """What a task's file says. Pids compare only within one `space`: a boot of a host and a pid namespace.

    `part`: the name of the file its results go to, empty where it only merges. `timeout`: seconds without a beat after
    which it may be given up.
    """

    task: str
    host: str
    space: str
    pid: int
    began: int
    part: str
    timeout: float
    beat: int = 0
    written: int = 0
    failed: int = 0

    def text(self) -> bytes:
        return json.dumps(asdict(self)).encode().ljust(CARD_BYTES - 1) + b"\n"


def read_card(path: Path) -> tuple[bytes, Card | None]:
    """The text of a task's file, and what it says (None: caught half written). Raises OSError."""
    with open(path, "rb") as file:  # opening it makes NFS ask the server for what is new
        raw = file.read(2 * CARD_BYTES)
    try:
        return raw, Card(**json.loads(raw))
    except (ValueError, TypeError):
        return raw, None


def space_of_pids() -> str:
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            return f"{file.read().strip()}/{os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:
        return f"{socket.gethostname()}/{os.urandom(8).hex()}"  # like no other: pids are not compared


def began(pid: int) -> int:
    """When a process began, in the kernel's ticks; 0: there is none, or only what a dead one left."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            fields = file.read().rpartition(b")")[2].split()
    except OSError:
        return 0
    return 0 if fields[0] in (b"Z", b"X") else int(fields[19])


def is_gone(card: Card, space: str) -> bool:
    """Whether the process of a task has ended for certain, as only its own host can tell."""
    return card.space == space and began(card.pid) != card.began


def others_alive(folder: Path, task: str) -> bool:
    """Whether another task than `task` has not left, as far as can be told at once."""
    space = space_of_pids()
    with contextlib.suppress(OSError):
        for path in folder.glob("*.task"):
            with contextlib.suppress(OSError):
                card = read_card(path)[1]
                if card is None or (card.task != task and not is_gone(card, space)):
                    return True
    return False


def counts(folder: Path) -> dict[str, tuple[int, int]]:
    """What each task has written so far, and how many errors among it, by its id."""
    found: dict[str, tuple[int, int]] = {}
    for path in folder.glob("t*.*"):
        if path.suffix in (".task", ".left", ".lost"):
            with contextlib.suppress(OSError):
                card = read_card(path)[1]
                if card is not None:
                    found[path.stem] = card.written, card.failed
    return found
