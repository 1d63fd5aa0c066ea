"""Room for weights that is touched while torch is imported: how large, when, and that the model gets it."""

from __future__ import annotations

import ctypes
import dataclasses
import json
import mmap
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from llama_dist import __main__ as entry
from llama_dist import cli
from llama_dist.config import RunConfig
from llama_dist.engine.plan import rank_weight_bytes, units_of, weight_sizes
from llama_dist.frontend import weights_ahead as guess
from llama_dist.model import ahead
from llama_dist.model.host_memory import host_memory
from llama_dist.model.shapes import SHAPES
from llama_dist.parallel.launch import Launch
from tests.conftest import Saver
from tests.test_room import is_there

MB = 2**20
pytestmark = pytest.mark.skipif(ahead.anonymous(MB) is None, reason="no large pages on this system")


def wait_until_touched(room: ahead.Ahead, size: int) -> None:
    deadline = time.monotonic() + 60
    while room.touched < size:
        assert time.monotonic() < deadline, f"{room.touched} of {size} bytes touched"
        time.sleep(0.01)


def test_what_was_touched_is_there_and_no_more_than_is_taken() -> None:
    room = ahead.Ahead(40 * MB)
    wait_until_touched(room, 40 * MB)
    taken = room.take(16 * MB)
    assert taken is not None
    bytes_of = torch.frombuffer(taken, dtype=torch.uint8)
    assert len(bytes_of) >= 40 * MB and not bytes_of[: 16 * MB].any()
    assert is_there(bytes_of[: 16 * MB]) == 1
    assert is_there(bytes_of[24 * MB :]) < 0.1
    assert not bytes_of.any()


def test_nothing_is_touched_once_the_room_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    rooms: list[ahead.Ahead] = []

    def slow(at: int, value: int, size: int) -> None:  # its first piece takes until the room is asked for
        while not (rooms and rooms[0]._taken.is_set()):
            time.sleep(0.01)
        memset(at, value, size)

    memset = ctypes.memset
    monkeypatch.setattr(ahead.ctypes, "memset", slow)
    rooms.append(ahead.Ahead(512 * MB))
    taken = rooms[0].take(512 * MB)
    assert taken is not None and rooms[0].touched <= ahead.PIECE
    bytes_of = torch.frombuffer(taken, dtype=torch.uint8)
    bytes_of[: 64 * MB] = 7  # what a loader writes stays
    time.sleep(0.3)
    assert bool((bytes_of[: 64 * MB] == 7).all())


def test_a_room_is_taken_once_and_not_by_more_than_fits() -> None:
    assert ahead.take(1) is None
    ahead.begin(MB)
    assert ahead.take(ahead.RESERVED * MB + 1) is None and ahead.take(1) is None
    ahead.begin(MB)
    assert ahead.take(ahead.RESERVED * MB) is not None and ahead.take(1) is None


def ranks(size: int) -> Launch:
    return Launch("torchrun", 0, size, 0, size, "localhost", 1)


@pytest.fixture
def on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guess, "GPUS", ())
    monkeypatch.setattr(guess, "one_node", lambda: True)
    monkeypatch.setattr(guess, "host_memory", lambda: 2**34)


@pytest.mark.usefixtures("on_a_cpu")
def test_the_guess_goes_by_files_flags_and_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def sparse(name: str, size: int) -> Path:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        with path.open("wb") as file:
            file.truncate(size)
        return path

    def of(path: Path, n_ranks: int = 1, **flags: object) -> int:
        run = RunConfig(ckpt_dir=str(path), **flags)  # type: ignore[arg-type]
        return guess.bytes_ahead(run, None, ranks(n_ranks))

    for part in (1, 2):
        directory = sparse(f"hf/model-{part}.safetensors", 200 * MB).parent
    sparse("hf/tokenizer.json", 900 * MB)
    assert of(directory) == of(directory, dtype="bfloat16") == 400 * MB
    assert of(directory, dtype="float32") == 800 * MB
    assert of(directory, quantization="int8") == 200 * MB and of(directory, quantization="int4") == 150 * MB
    assert of(directory, 4) == 100 * MB and of(directory, 4, model_parallel_size=2) == 200 * MB
    assert of(sparse("a-BF16.gguf", 100 * MB)) == 100 * MB and of(sparse("a.F16.gguf", 100 * MB)) == 200 * MB
    assert of(sparse("Qwen3-Q4_K_M.gguf", 100 * MB), dtype="bfloat16") == 2 * 800 * MB // 5
    assert of(sparse("unnamed.gguf", 100 * MB)) == of(sparse("meta/consolidated.00.pth", 100 * MB).parent) == 100 * MB
    # Nothing where it does not pay, or is not known.
    (tmp_path / "pipe").mkdir()
    os.mkfifo(tmp_path / "pipe" / "model.safetensors")
    assert of(tmp_path / "pipe") == of(tmp_path / "pipe" / "model.safetensors") == 0
    single = sparse("float/model.safetensors", 200 * MB)
    with single.open("r+b") as file:
        file.write(b'........{"lm_head.weight":{"dtype":"F32","shape":[1]')
    sparse("float/consolidated.safetensors", 200 * MB)
    assert of(single.parent) == 200 * MB and of(single.parent, dtype="bfloat16") == 100 * MB
    assert of(sparse("small.gguf", 20 * MB)) == 0 and of(tmp_path / "none") == 0 and of(tmp_path / "hf", 16) == 0
    assert of(directory, device="cuda") == 0
    assert of(sparse("huge/model.safetensors", 9 * 2**30).parent) == 0  # more than half of what is left
    monkeypatch.setattr(guess, "one_node", lambda: False)
    assert of(directory) == 0
    monkeypatch.setattr(guess, "one_node", lambda: True)
    monkeypatch.setattr(guess, "GPUS", (os.devnull,))
    assert of(directory) == 0 and of(directory, device="cpu") == 400 * MB


@pytest.mark.usefixtures("on_a_cpu")
@pytest.mark.parametrize("quantization", [None, "int8", "int4", "fp8"])
@pytest.mark.parametrize("n_ranks", [1, 2])
def test_a_model_has_room_in_what_is_guessed(n_ranks: int, quantization: str | None, tmp_path: Path) -> None:
    for shape in ("smollm2-135m", "llama-3.2-1b"):
        config = SHAPES[shape]
        units = units_of(config, n_ranks, None)
        needed = sum(weight_sizes(config, units, n_ranks, 2, quantization))
        run = RunConfig(ckpt_dir=shape, quantization=quantization)
        size = guess.bytes_ahead(run, shape, ranks(n_ranks))
        assert size == max(rank_weight_bytes(config, units, n_ranks, 2, quantization))
        with (tmp_path / f"{shape}.gguf").open("wb") as file:  # a file of the same numbers
            file.truncate(sum(weight_sizes(config, units_of(config, 1, None), 1, 2, None)))
        found = guess.bytes_ahead(dataclasses.replace(run, ckpt_dir=file.name), None, ranks(n_ranks))
        assert needed <= ahead.RESERVED * min(size, found)
        assert max(size, found) < 1.7 * needed


def test_this_host_has_memory() -> None:
    assert 2**28 < host_memory() < 2**50


def test_a_room_that_cannot_be_had_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*args: object, **kwargs: object) -> mmap.mmap:
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(ahead.mmap, "mmap", refused)
    ahead.begin(64 * MB)
    assert ahead.take(MB) is None


def test_children_and_what_loads_nothing_touch_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[int] = []
    monkeypatch.setattr(entry, "bytes_ahead", lambda run, shape, launch: 5)
    monkeypatch.setattr(ahead, "begin", begun.append)
    for words in (
        ["bench", "--shape=smollm2-135m", "--against=transformers"],
        ["plan", "--ckpt_dir=x", "--gpus=1", "--gpu_memory=80GB"],
        ["doctor"],
    ):
        entry.begin_room(cli.parse(words), ranks(1))
    assert not begun
    entry.begin_room(cli.parse(["bench", "--shape=smollm2-135m"]), ranks(1))
    assert begun == [5]


SCRIPT = """
import json, sys
from llama_dist.frontend import weights_ahead
from llama_dist.model import ahead
weights_ahead.LEAST, weights_ahead.one_node = 1, lambda: True
begin, take, seen = ahead.begin, ahead.take, []
def spy_begin(size):
    seen.append(["begun", size, "torch" in sys.modules])
    begin(size)
def spy_take(size):
    sys.modules["llama_dist.model.room"].LEAST = 1
    room = take(size)
    seen.append(["taken", size, room is not None])
    return room
ahead.begin, ahead.take = spy_begin, spy_take
from llama_dist.__main__ import main
code = main(sys.argv[1:])
print(json.dumps([code, seen]))
"""


def test_a_command_touches_it_before_torch_and_its_model_takes_it(checkpoint: Saver) -> None:
    path = checkpoint("llama-gqa", "hf")
    words = ["generate", f"--ckpt_dir={path}", "--device=cpu", "--prompt=hi", "--max_gen_len=4", "--temperature=0"]
    root = Path(__file__).resolve().parent.parent
    done = [
        subprocess.run(
            [sys.executable, *start, *words], capture_output=True, text=True, timeout=120, check=True, cwd=root
        ).stdout
        for start in (["-c", SCRIPT], ["-m", "llama_dist"])
    ]
    text, _, report = done[0].rstrip("\n").rpartition("\n")
    code, ((begun, size, had_torch), (taken, needed, was_there)) = json.loads(report)
    assert (code, begun, taken, had_torch, was_there) == (0, "begun", "taken", False, True), report
    assert 0 < needed <= ahead.RESERVED * size
    assert text.strip() == done[1].strip()
