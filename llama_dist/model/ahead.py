"""Room for a model's weights that is touched while torch is still being imported. No torch.

Memory is there when it is first touched: the kernel clears a page, and the host of a virtual machine may have to find
one. That takes as long as reading the weights from files, and longer on some hosts, most of it spent waiting.
"""

from __future__ import annotations

import ctypes
import mmap
import threading

PIECE = 2**24  # bytes touched between two looks at whether the room has been taken
RESERVED = 4  # times what is touched: addresses cost nothing, and weights of another type than the file's still fit


def anonymous(size: int) -> mmap.mmap | None:
    """`size` bytes of zeros, in large pages as far as the kernel has some; None where there are none."""
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return None
    # Private: what could be shared is kept in small pages by most kernels.
    try:
        room = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        room.madvise(mmap.MADV_HUGEPAGE)
    except OSError:  # no room for so much, or a kernel built without them
        return None
    return room


class Ahead:
    """A room whose first `size` bytes a thread touches until the room is taken."""

    def __init__(self, size: int) -> None:
        self._room = anonymous(RESERVED * size)
        self.touched = 0
        self._taken = threading.Event()
        self._thread = threading.Thread(target=self._touch, args=(size,), daemon=True)
        if self._room is not None:
            self._thread.start()

    def _touch(self, size: int) -> None:
        assert self._room is not None
        at = ctypes.addressof(ctypes.c_char.from_buffer(self._room))
        while self.touched < size and not self._taken.is_set():
            ctypes.memset(at + self.touched, 0, min(PIECE, size - self.touched))
            self.touched = min(size, self.touched + PIECE)

    def take(self, size: int) -> mmap.mmap | None:
        """A room of `size` bytes or more, all zeros; None where this one is too small. Nothing more is touched."""
        self._taken.set()
        if self._room is None:
            return None
        self._thread.join()
        room, self._room = self._room, None
        if len(room) < size:
            return None
        needless = -(-size // PIECE) * PIECE
        if needless < self.touched:
            room.madvise(mmap.MADV_DONTNEED, needless)
        return room


_begun: list[Ahead] = []  # of this process, as its memory is: what the command line began and the model takes


def begin(size: int) -> None:
    """Have room for about `size` bytes of weights touched from now on."""
    _begun.append(Ahead(size))


def take(size: int) -> mmap.mmap | None:
    """What was begun, if it has room for `size` bytes; it is taken once."""
    return _begun.pop().take(size) if _begun else None
