"""Blocks of GGUF files become the floats that the `gguf` package makes of them, bit for bit."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch

from llama_dist.kernels import blocks


@pytest.mark.parametrize("name", blocks.KINDS)
def test_a_type_is_what_the_package_says(name: str) -> None:
    kind, quant = blocks.KINDS[name], gguf.GGMLQuantizationType[name]
    assert (kind.number, (kind.numbers, kind.n_bytes)) == (quant.value, gguf.GGML_QUANT_SIZES[quant])


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("name", blocks.KINDS)
def test_any_bytes_give_the_package_s_floats(name: str, threads: int) -> None:
    """Random bytes: scales of all sizes, subnormal, infinite and NaN ones too."""
    if blocks._compiled() is None:
        pytest.skip("no C++ compiler")
    kind, before = blocks.KINDS[name], torch.get_num_threads()
    raw = torch.from_numpy(np.random.default_rng(5).integers(0, 256, (67, 3 * kind.n_bytes), np.uint8))
    torch.set_num_threads(threads)
    try:
        ours = blocks.decode(raw, kind)
    finally:
        torch.set_num_threads(before)
    with np.errstate(all="ignore"):
        theirs = blocks.decode_twin(raw, kind)
    assert ours.shape == theirs.shape == (67, 3 * kind.numbers)
    assert theirs.isfinite().sum() > theirs.numel() // 2
    nan = theirs.isnan()
    assert bool((ours.isnan() == nan).all())
    assert bool((ours.view(torch.int32) == theirs.view(torch.int32))[~nan].all())
