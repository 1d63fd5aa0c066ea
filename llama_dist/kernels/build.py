"""Compiling the C++ kernels once, and loading them: plain C functions, called through ctypes.

They are compiled for the processor they run on and kept under $XDG_CACHE_HOME/llama_dist, named after sources, flags,
compiler and processor. They use torch's own OpenMP threads: its libgomp is in the process already, so none is linked.
Where there is no compiler, `library` is None and torch's own operations serve.
"""

from __future__ import annotations

import ctypes
import fcntl
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

log = logging.getLogger("llama_dist")

SOURCES = Path(__file__).parent / "src"
# No contraction and no reassociation: what is summed in which order is what the source says.
FLAGS = ("-O3", "-march=native", "-std=c++17", "-fopenmp", "-ffp-contract=off", "-fno-math-errno", "-fPIC", "-shared")
SECONDS = 120  # for a compiler that hangs


def compiler() -> str | None:
    """The C++ compiler: $CXX, else the first of the usual names that there is."""
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    return next((found for found in map(shutil.which, names) if found), None)


def cache_folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "llama_dist"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return "\n".join(sorted({line for line in lines if line.startswith(("flags", "Features", "model name"))}))


def _key(cxx: str, sources: list[Path]) -> str:
    digest = hashlib.blake2b(digest_size=10)
    version = subprocess.run([cxx, "--version"], capture_output=True, timeout=SECONDS).stdout
    for part in (version, " ".join(FLAGS).encode(), _processor().encode()):
        digest.update(part + b"\0")
    for source in sources:
        digest.update(source.read_bytes() + b"\0")
    return digest.hexdigest()


def _compile(cxx: str, sources: list[Path], target: Path) -> None:
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        made = Path(scratch) / target.name
        units = [str(source) for source in sources if source.suffix == ".cpp"]
        # -fopenmp is for the compiler only: linked with it, the library would bring a second pool of threads.
        command = [cxx, *FLAGS, "-nostartfiles", *units, "-o", str(made), "-Wl,--as-needed"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
        if done.returncode:
            lines = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines()[:1]
            raise OSError(f"{cxx} failed: {' '.join(lines[:1])[:200]}")
        os.replace(made, target)


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled kernels, made now if they are not there yet; None where that cannot be, which is said once."""
    try:
        return _load()
    except (OSError, subprocess.SubprocessError) as err:
        log.info("computing with torch's own operations: %s", " ".join(str(err).split())[:300])
        return None


def _load() -> ctypes.CDLL:
    if sys.platform != "linux":
        raise OSError("the C++ kernels are for Linux")
    cxx = compiler()
    if cxx is None:
        raise OSError("there is no C++ compiler; install g++ for more speed")
    sources = sorted(path for path in SOURCES.iterdir() if path.suffix in (".cpp", ".h"))
    folder = cache_folder()
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / f"kernels-{_key(cxx, sources)}.so"
    if not target.exists():
        with open(folder / "lock", "w") as lock:  # the ranks of a host compile it once
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not target.exists():
                _compile(cxx, sources, target)
    return ctypes.CDLL(str(target))
