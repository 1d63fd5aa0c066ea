"""The kernels as processors with AVX-512 run them, by emulation where this one has AVX2 only: the same tests hold."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.kernel_cases import need_kernels

HERE = Path(__file__).parent
ROWS = ["test_kernels_attention.py", "test_draws.py"]
PACKED = ["test_kernels_lanes.py", "test_panels.py", "test_quantized.py"]
KINDS = {
    "avx512_bf16": ("", ROWS + PACKED + ["test_kernels_small.py"]),
    "avx512": ("-DFIRST_AVX512", PACKED),
    "amx": (
        "-DAMX",
        [
            "test_panels.py",
            "test_quantized.py",
            "test_program.py",
            "test_kernels_attention.py",
            "test_kernels_small.py",
        ],
    ),
}
"""By what the kernels call the processor: flags that make it so, and the tests of what is peculiar to it."""


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", KINDS)
def test_kernels_emulated(name: str, tmp_path: Path) -> None:
    need_kernels()
    words = set(Path("/proc/cpuinfo").read_text().split())
    if "avx2" not in words or not Path("/usr/include/simde/x86/avx512.h").exists():
        pytest.skip("needs AVX2 and SIMDe (Debian's libsimde-dev)")
    flags, files = KINDS[name]
    env = os.environ | {"XDG_CACHE_HOME": str(tmp_path), "CXX": str(HERE / "avx512" / "g++"), "CXX_FLAGS": flags}
    env = {key: value for key, value in env.items() if not key.startswith("PYTEST_")}

    def python(*words: str) -> str:
        done = subprocess.run(
            [sys.executable, *words], env=env, cwd=HERE.parent, capture_output=True, text=True, timeout=850
        )
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        return done.stdout

    said = python("-c", "import torch; from llama_dist.kernels import build; print(build.build_name())")
    assert said.endswith(f"({name})\n"), said
    said = python("-m", "pytest", "-p", "no:cacheprovider", *(str(HERE / file) for file in files))
    assert re.search(r"\d\d+ passed", said), said
