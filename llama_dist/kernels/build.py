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
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

log = logging.getLogger("llama_dist")

SOURCES = Path(__file__).parent / "src"
# No contraction and no reassociation: what is summed in which order is what the source says.
FLAGS = ("-O3", "-march=native", "-std=c++17", "-fopenmp", "-ffp-contract=off", "-fno-math-errno", "-fPIC")
INSTRUCTIONS = ("portable", "avx512", "avx512_bf16", "amx")
SECONDS = 120  # for a compiler that hangs


def compiler() -> str | None:
    """The C++ compiler: $CXX, else g++ (whose threads torch's are), else the first of the usual names that there is."""
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "c++", "clang++"]
    return next((found for found in map(shutil.which, names) if found), None)


def cache_folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
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


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=SECONDS)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines()[:1]
        raise OSError(f"{command[0]} failed: {' '.join(lines[:1])[:200]}")


def compile_to(target: Path, cxx: str, sources: list[Path], *flags: str) -> None:
    """Compile the .cpp files among `sources` with FLAGS and `flags` into one library, put at `target` when complete."""
    at_once = len(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch, ThreadPoolExecutor(at_once) as pool:

        def compile_one(source: Path) -> str:
            made = f"{scratch}/{source.stem}.o"
            _run([cxx, *FLAGS, *flags, "-c", str(source), "-o", made])
            return made

        # The largest first, since they take longest.
        parts = sorted((s for s in sources if s.suffix == ".cpp"), key=lambda s: s.stat().st_size, reverse=True)
        objects = list(pool.map(compile_one, parts))
        made = f"{scratch}/{target.name}"
        # Linked without -fopenmp: with it the library would ask for a libgomp, maybe another one than torch's.
        _run([cxx, "-shared", *objects, "-o", made])
        os.replace(made, target)


def open_library(path: Path) -> ctypes.CDLL:
    """Load compiled kernels; their OpenMP calls go to the library that torch has loaded."""
    if not hasattr(ctypes.CDLL(None), "GOMP_parallel"):
        loaded = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if "/" in line}
        for name in sorted(name for name in loaded if "omp" in Path(name).name):
            ctypes.CDLL(name, mode=ctypes.RTLD_GLOBAL)
    return ctypes.CDLL(str(path))


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled kernels, made now if they are not there yet; None where that cannot be, which is said once."""
    try:
        return _load()
    except (OSError, subprocess.SubprocessError) as err:
        log.info("computing with torch's own operations: %s", " ".join(str(err).split())[:300])
        return None


def _sources() -> list[Path]:
    return sorted(path for path in SOURCES.iterdir() if path.suffix in (".cpp", ".h"))


def _load() -> ctypes.CDLL:
    if sys.platform != "linux":
        raise OSError("the C++ kernels are for Linux")
    cxx = compiler()
    if cxx is None:
        raise OSError("there is no C++ compiler; install g++ for more speed")
    sources = _sources()
    folder = cache_folder()
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / f"kernels-{_key(cxx, sources)}.so"
    if not target.exists():
        with open(folder / "lock", "w") as lock:  # the ranks of a host compile it once
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not target.exists():
                compile_to(target, cxx, sources)
    return open_library(target)


@functools.cache
def function(name: str, *arguments: Any) -> Any:
    """The C function llama_dist_`name`, taking `arguments` (ctypes types), returning an int; None without a library."""
    compiled = library()
    if compiled is None:
        return None
    found = getattr(compiled, f"llama_dist_{name}")
    found.argtypes, found.restype = arguments, ctypes.c_int
    return found


def build_name() -> str:
    """What the compiled kernels' bits depend on: a digest of their sources, and the instructions they use."""
    digest = hashlib.blake2b(digest_size=4)
    for source in _sources():
        digest.update(source.read_bytes() + b"\0")
    return f"C++ kernels {digest.hexdigest()} ({INSTRUCTIONS[function('instructions')()]})"
