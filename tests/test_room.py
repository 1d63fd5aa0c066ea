"""All weights of a model in one place, what is a view of another still that."""

from __future__ import annotations

import itertools
import mmap
from pathlib import Path

import pytest
import torch

from llama_dist.engine.plan import units_of
from llama_dist.kernels import build
from llama_dist.kernels.touch import touch
from llama_dist.model import room
from llama_dist.model.shapes import SHAPES
from llama_dist.model.transformer import Transformer
from llama_dist.parallel import layers
from llama_dist.parallel.layers import Part


@pytest.mark.skipif(not hasattr(mmap, "MADV_HUGEPAGE"), reason="no large pages on this system")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_weights_lie_in_one_room(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layers.fs, "get_model_parallel_world_size", lambda: 1)
    monkeypatch.setattr(room, "LEAST", 1)
    config = SHAPES["tiny"]
    model = Transformer(config, units_of(config, 1, None), Part(0, 1, dtype, torch.device("cpu")))
    shapes = {name: tuple(weight.shape) for name, (weight, _) in model.weights().items()}
    room.move_together(model)
    assert {name: tuple(weight.shape) for name, (weight, _) in model.weights().items()} == shapes
    tensors = [t for t in room._tensors(model) if t.numel()]
    assert len({t.untyped_storage().data_ptr() for t in tensors}) == 1
    assert not any(t.count_nonzero() for t in tensors)
    # Each logical weight has bytes of its own, and a fused one is made of its parts.
    parts = [t for weight, _ in model.weights().values() for t in getattr(weight, "parts", (weight,)) if t.numel()]
    spans = sorted((t.data_ptr(), t.data_ptr() + t.nbytes) for t in parts)
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(spans))
    attention = model.layers[1].attention
    fused, first = (getattr(m.weight, "codes", m.weight) for m in (attention.wqkv, attention.wq))
    first.fill_(7)
    assert fused.data_ptr() == first.data_ptr() and bool((fused[: len(first)] == 7).all())


def in_large_pages(t: torch.Tensor) -> int:
    """Bytes of the mapping of `t` that lie in large pages, as the kernel has it."""
    here, found = False, 0
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first = line.split()[0]
        if "-" in first and not first.endswith(":"):
            start, stop = (int(end, 16) for end in first.split("-"))
            here = start <= t.data_ptr() < stop
        elif here and first == "AnonHugePages:":
            found = int(line.split()[1]) * 1024
    return found


def test_large_pages_are_large() -> None:
    setting = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if not setting.exists() or "[never]" in setting.read_text():
        pytest.skip("this kernel gives no large pages")
    private = mmap.mmap(-1, 64 * 2**20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    private.madvise(mmap.MADV_HUGEPAGE)
    if not in_large_pages(torch.frombuffer(private, dtype=torch.uint8).fill_(1)):
        pytest.skip("no large page is free here")  # the kernel need not give them
    found = room.large_pages(64 * 2**20)
    assert found is not None and not found.any()
    assert in_large_pages(found.fill_(1)) >= 2**21


def resident() -> int:
    """Bytes of this process that are there."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="no way to ask what is there")
def test_touched_memory_is_there_and_holds_what_it_held() -> None:
    if build.library() is None:
        pytest.skip("no C++ kernels")
    size = 64 * 2**20
    fresh = torch.frombuffer(mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), dtype=torch.uint8)
    before = resident()
    fresh[size // 3] = 7
    assert resident() - before < size / 2
    touch(fresh)
    assert resident() - before > size * 0.9
    assert fresh[size // 3] == 7 and fresh.count_nonzero() == 1
    apart = torch.arange(2**21)[::2]
    touch(apart)  # no one run of memory: left alone
    assert bool((apart == torch.arange(0, 2**21, 2)).all())
