"""The README's commands and its Python are run as they stand, in a copy of the repository."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests import assets

ROOT = Path(__file__).parent.parent
NOT_HERE = ("./launch/test.sh", "source ")  # these tests themselves; the shell's own
pytestmark = [pytest.mark.spmd, pytest.mark.slow]


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", (ROOT / "README.md").read_text(), re.DOTALL | re.MULTILINE)


def commands() -> list[str]:
    """In the README's order: some need what those before them made."""
    return [line for block in blocks("sh") for line in block.splitlines() if not line.startswith(NOT_HERE)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The working tree's scripts, this environment, and the model where the quickstart puts it."""
    copy = tmp_path_factory.mktemp("readme")
    for name in ("launch", "llama_dist", "pyproject.toml", "README.md", "LICENSE"):
        (copy / name).symlink_to(ROOT / name)
    (copy / ".cache" / "smollm2").mkdir(parents=True)
    model = assets.smollm2_gguf()
    (copy / ".cache" / "smollm2" / model.name).symlink_to(model)
    return copy


def run(words: list[str] | str, folder: Path) -> str:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    env = {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), "LLAMA_DIST_CACHE": str(folder / ".cache")}
    shell = isinstance(words, str)
    done = subprocess.run(words, shell=shell, cwd=folder, env=env, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, f"{words}\n{done.stderr}"
    return done.stdout


def test_there_are_commands_and_code() -> None:
    assert len(commands()) >= 8 and len(blocks("python")) == 1


@pytest.mark.parametrize("command", commands())
def test_a_command_works_as_written(folder: Path, command: str) -> None:
    if "--out_dir" in command:
        shutil.rmtree(folder / ".cache" / "smollm2-hf", ignore_errors=True)
    if command.startswith("./launch/") and not (ROOT / ".venv" / ".installed").exists():
        pytest.skip("no .venv made by launch/test.sh")
    command = command.replace("./launch/", f"{ROOT}/launch/")
    command = re.sub(r"^llama_dist ", f"{sys.executable} -m llama_dist ", command)
    command = re.sub(r"(^|\| )torchrun ", rf"\1{sys.executable} -m torch.distributed.run ", command)
    out = run(command, folder)
    assert out.strip() or any(word in command for word in ("convert", "batch", "> .cache"))


def test_the_python_works_as_written(folder: Path) -> None:
    (code,) = blocks("python")
    assert "Paris" in run([sys.executable, "-c", code], folder)
