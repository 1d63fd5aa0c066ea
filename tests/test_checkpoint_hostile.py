"""Damaged and hostile files: each is refused in one line that says what is wrong, in under 2 s and 300 MB.

All cases are opened by one child process, which measures itself; a test per case reads what it found.
"""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from llama_dist.checkpoint.open import open_checkpoint
from llama_dist.errors import CheckpointError
from tests import hostile_gguf, hostile_meta, hostile_safetensors
from tests.hostile import CASES

# Importing the three modules fills CASES; these make the sound file that each starts from.
MAKERS = {"meta": hostile_meta.meta, "hf": hostile_safetensors.hf, "gguf": hostile_gguf.sound}

CHILD = """
import json, sys, time
import torch
from llama_dist.checkpoint.open import open_checkpoint
from llama_dist.errors import CheckpointError
torch.set_num_threads(1)
def peak():  # not getrusage, which starts from the peak of the process that called us
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) / 1024
try: open_checkpoint(sys.argv[1])  # whatever the first use of anything allocates
except CheckpointError: pass
for path in sys.argv[2:]:
    before, start = peak(), time.process_time()
    try:
        open_checkpoint(path)
        message = "accepted"
    except CheckpointError as error:
        message = str(error)
    except BaseException as error:
        message = f"not a CheckpointError: {error!r}"
    print(json.dumps([message, time.process_time() - start, peak() - before]))
"""


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, tuple[str, float, float]]]:
    """Message, CPU seconds and MB of new peak of every case."""
    root = tmp_path_factory.mktemp("hostile")
    folders = [root / "none"]
    for number, (make, _) in enumerate(CASES.values()):
        folders.append(root / str(number))
        folders[-1].mkdir()
        make(folders[-1])
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", CHILD, *folders], capture_output=True, text=True, cwd=root, env=env)
    assert done.returncode == 0, done.stderr[-2000:]
    assert not (root / "owned").exists()
    yield dict(zip(CASES, (tuple(json.loads(line)) for line in done.stdout.splitlines()), strict=True))


@pytest.mark.parametrize("name", CASES)
def test_hostile(found: dict[str, tuple[str, float, float]], name: str) -> None:
    message, seconds, megabytes = found[name]
    pattern = CASES[name][1].replace("[", r"\[").replace("]", r"\]")
    assert re.search(pattern, message), message
    assert message.isprintable() and len(message) < 600
    assert seconds < 2 and megabytes < 300


def test_hostile_in_all(found: dict[str, tuple[str, float, float]]) -> None:
    assert sum(megabytes for _, _, megabytes in found.values()) < 300


@pytest.mark.parametrize("form", MAKERS)
def test_the_sound_files_are_accepted(tmp_path: Path, form: str) -> None:
    """So that the cases above are refused for what they change."""
    MAKERS[form](tmp_path)
    open_checkpoint(tmp_path).close()


@pytest.mark.parametrize("form", MAKERS)
def test_flipped_bytes_never_raise_anything_else(tmp_path: Path, form: str) -> None:
    """Random damage to a header: a CheckpointError, or a reader whose every tensor can be read."""
    path = MAKERS[form](tmp_path)
    data = path.read_bytes()
    draw, accepted = random.Random(11), 0
    # The .pth has its pickle first and its directory last, the others all of the header first.
    places = [*range(3000), *range(len(data) - 2500, len(data))] if form == "meta" else [*range(3000)]
    for _ in range(150):
        damaged = bytearray(data)
        for _ in range(draw.randint(1, 4)):
            damaged[draw.choice(places)] = draw.randrange(256)
        path.write_bytes(damaged)
        try:
            reader = open_checkpoint(tmp_path)
        except CheckpointError as error:
            assert str(error).isprintable()
            continue
        for name in reader.tensors:
            for _ in reader.read(name):
                pass
        reader.close()
        accepted += 1
    assert accepted < 150
