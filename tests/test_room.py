"""All weights of a model in one place, what is a view of another still that."""

from __future__ import annotations

import ctypes
import itertools
import mmap
from collections.abc import Callable
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


def come_in_large_pages(t: torch.Tensor, fill: Callable[[torch.Tensor], object]) -> int:
    """How many bytes more of the mapping of `t`, which may hold others too, lie in large pages once it is filled."""
    before = in_large_pages(t)
    fill(t)
    return in_large_pages(t) - before


def plain_large_pages() -> int:
    """Bytes of 64 MB in large pages as the kernel gives them when they are asked for by hand."""
    private = mmap.mmap(-1, 64 * 2**20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    private.madvise(mmap.MADV_HUGEPAGE)
    return come_in_large_pages(torch.frombuffer(private, dtype=torch.uint8), lambda t: t.fill_(1))


def test_large_pages_are_large() -> None:
    setting = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if not setting.exists() or "[never]" in setting.read_text():
        pytest.skip("this kernel gives no large pages")
    if not plain_large_pages():
        pytest.skip("no large page is free here")  # the kernel need not give them
    found = room.large_pages(64 * 2**20)
    zeros = room.large_pages(2**22)
    assert found is not None and zeros is not None and not zeros.any()
    assert come_in_large_pages(found, lambda t: t.fill_(1)) >= 2**21


def is_there(t: torch.Tensor) -> float:
    """The share of a tensor's pages that are in memory (mincore)."""
    start = t.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
    size = t.data_ptr() + t.nbytes - start
    found = (ctypes.c_ubyte * -(-size // mmap.PAGESIZE))()
    assert ctypes.CDLL(None).mincore(ctypes.c_void_p(start), ctypes.c_size_t(size), found) == 0
    return sum(page & 1 for page in found) / len(found)


def populates() -> bool:
    """Whether this kernel has MADV_POPULATE_WRITE (23)."""
    page = mmap.mmap(-1, mmap.PAGESIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    at = torch.frombuffer(page, dtype=torch.uint8).data_ptr()
    return not ctypes.CDLL(None).madvise(ctypes.c_void_p(at), ctypes.c_size_t(mmap.PAGESIZE), 23)


@pytest.mark.parametrize("threads", [1, 3])
def test_touched_memory_is_there_and_holds_what_it_held(threads: int) -> None:
    if build.library() is None or not populates():
        pytest.skip("no C++ kernels, or a kernel that cannot")
    size, before = 64 * 2**20, torch.get_num_threads()
    room_of_it = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    fresh = torch.frombuffer(room_of_it, dtype=torch.uint8)[100:-100]
    fresh[size // 3] = 7
    assert is_there(fresh) < 0.5
    torch.set_num_threads(threads)
    try:
        touch(fresh)
        assert is_there(fresh) == 1
        assert fresh[size // 3] == 7 and fresh.count_nonzero() == 1
        apart = torch.arange(2**21)[::2]
        touch(apart)  # no one run of memory: left alone
        assert bool((apart == torch.arange(0, 2**21, 2)).all())
    finally:
        torch.set_num_threads(before)


def test_touched_large_pages_are_large() -> None:
    setting = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if not setting.exists() or "[never]" in setting.read_text() or build.library() is None or not populates():
        pytest.skip("no large pages, no C++ kernels, or a kernel that cannot")
    if not plain_large_pages():
        pytest.skip("no large page is free here")
    found = room.large_pages(64 * 2**20)
    assert found is not None
    assert come_in_large_pages(found, touch) >= 2**21
