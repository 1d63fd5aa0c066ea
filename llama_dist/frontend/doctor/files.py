"""What one rank sees of the checkpoint and of the output's folder, and how fast it reads. Writes nothing but one small
file, on rank 0, into the output's folder, and takes it away again."""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import mmap
import os
import re
import time
from pathlib import Path

from llama_dist.checkpoint.open import open_checkpoint
from llama_dist.errors import ConfigError
from llama_dist.frontend.doctor.facts import Look, Reading, Sight

SUFFIXES = (".pth", ".safetensors", ".gguf", ".json", ".model", ".jinja")  # of files that make a checkpoint
WEIGHTS = (".pth", ".safetensors", ".gguf")
SAMPLE = 16 * 1024  # bytes at the start, the middle and the end of a file
CHUNK = 4 * 2**20
MOST_BYTES, MOST_SECONDS = 512 * 2**20, 2.0  # read of a checkpoint to time it
LOOK_SECONDS = 3.0  # for what rank 0 wrote to be seen by the others


def checkpoint_files(path: Path) -> list[Path]:
    """The files of a checkpoint, by name."""
    if path.is_file():
        return [path]
    return sorted(p for p in path.iterdir() if p.suffix.lower() in SUFFIXES and p.is_file())


def look(ckpt_dir: str) -> Look:
    """The checkpoint, its headers checked. Raises CheckpointError, OSError."""
    path = Path(ckpt_dir)
    reader = open_checkpoint(path)
    reader.close()
    stamps, digests = [], {}
    for file in checkpoint_files(path):
        with open(file, "rb") as f:
            stat = os.fstat(f.fileno())
            stamps.append((file.name, stat.st_size, stat.st_ino, stat.st_mtime_ns, stat.st_ctime_ns))
            digest = hashlib.blake2b(f"{stat.st_size}\0".encode(), digest_size=8)
            for start in (0, stat.st_size // 2, stat.st_size - SAMPLE):
                digest.update(os.pread(f.fileno(), SAMPLE, max(0, start)))
            digests[file.name] = digest.hexdigest()
    total = sum(size for name, size, *_ in stamps if name.lower().endswith(WEIGHTS))
    return Look(reader.format, total, mount_of(path), tuple(stamps), digests)


def mount_of(path: Path) -> str:
    """The file system a path is on: `nfs4 server:/export`."""
    real, best = os.path.realpath(path), ("", "unknown file system")
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/mountinfo").read_text().splitlines():
            own, _, rest = line.partition(" - ")
            point = re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), own.split()[4])
            kind, source = rest.split()[:2]
            inside = real == point or real.startswith(point.rstrip("/") + "/")
            if inside and len(point) >= len(best[0]):  # of two mounted on one another the later counts
                best = point, kind if source in (kind, "none") else f"{kind} {source}"
    return best[1]


# ---- the output's folder


def put(output_file: str) -> list[str]:
    """Rank 0 writes a small file beside the output: its path and its text. Raises ConfigError."""
    folder = Path(os.path.realpath(output_file)).parent
    path, text = folder / f".llama_dist-doctor-{os.getpid()}", os.urandom(16).hex()
    try:
        path.write_text(text)
    except OSError as err:
        raise ConfigError(
            f"cannot write into the folder of --output_file {output_file}: {err.strerror}; results could not be kept"
        ) from None
    return [str(path), text]


def see(output_file: str, text: str, name: str) -> Sight:
    """Whether the file that rank 0 put beside the output is there on this rank too."""
    folder = Path(os.path.realpath(output_file)).parent
    deadline = time.monotonic() + LOOK_SECONDS
    while True:
        try:
            sees = (folder / name).read_text() == text
        except OSError:
            sees = False
        if sees or time.monotonic() > deadline or not folder.is_dir():
            return Sight(folder.is_dir(), sees, os.access(folder, os.W_OK), mount_of(folder))
        time.sleep(0.1)


# ---- reading


def _pieces(ckpt_dir: str, share: tuple[int, int]) -> list[tuple[Path, int, int]]:
    """File, start and length of what to read: MOST_BYTES at most, from this share's part on, around the end."""
    files = [(file, file.stat().st_size) for file in checkpoint_files(Path(ckpt_dir)) if file.suffix.lower() in WEIGHTS]
    total = sum(size for _, size in files)
    skip, wanted = total * share[0] // share[1], min(total, MOST_BYTES)
    found: list[tuple[Path, int, int]] = []
    for file, size in [*files, *files]:
        start = min(skip, size)
        skip -= start
        length = min(size - start, wanted)
        if length:
            found.append((file, start, length))
            wanted -= length
    return found


def _resident(fd: int, start: int, length: int) -> int | None:
    """Bytes of a part of a file that lie in memory; None where the kernel does not tell (see mincore(2))."""
    stat = os.fstat(fd)
    if stat.st_uid != os.geteuid() and os.geteuid() != 0 and not os.access(f"/proc/self/fd/{fd}", os.W_OK):
        return None
    page = mmap.PAGESIZE
    first = start // page * page
    size = start + length - first
    with mmap.mmap(fd, size, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE, offset=first) as view:
        pages = (ctypes.c_ubyte * (-(-size // page)))()
        held = ctypes.c_char.from_buffer(view)
        libc = ctypes.CDLL(None, use_errno=True)
        failed = libc.mincore(ctypes.c_void_p(ctypes.addressof(held)), ctypes.c_size_t(size), pages)
        del held  # the view cannot be closed before
    return None if failed else min(length, page * sum(p & 1 for p in pages))


def read(ckpt_dir: str, share: tuple[int, int]) -> Reading:
    """Read the checkpoint as loading does, MOST_BYTES or MOST_SECONDS of it. Hosts begin in different places of it.

    `share`: this host's number and their count. Raises OSError.
    """
    pieces = _pieces(ckpt_dir, share)
    buffer = bytearray(CHUNK)
    view = memoryview(buffer)
    done, cached = 0, 0.0
    known = True
    spent = 0.0
    for file, start, length in pieces:
        fd = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
        try:
            resident = _resident(fd, start, length)
            known = known and resident is not None
            began, at = time.perf_counter(), start
            while at < start + length and spent + time.perf_counter() - began < MOST_SECONDS:
                got = os.preadv(fd, [view[: min(CHUNK, start + length - at)]], at)
                if not got:
                    raise OSError(f"{file} ends at byte {at}: truncated while it was read")
                at += got
            spent += time.perf_counter() - began
            done += at - start
            cached += (resident or 0) * (at - start) / length
        finally:
            os.close(fd)
        if spent > MOST_SECONDS:
            break
    return Reading(done, spent, cached / done if known and done else None)
