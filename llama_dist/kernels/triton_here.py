"""Whether the Triton kernels serve here. They are imported when a tensor on a CUDA device first asks for one.

Triton comes with torch's CUDA builds. It compiles for the device at hand and keeps what it made under ~/.triton.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import logging
from pathlib import Path

import torch

log = logging.getLogger("llama_dist")

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def serves(x: torch.Tensor) -> bool:
    """Whether Triton computes with tensors like x."""
    return x.device.type == "cuda" and x.dtype in DTYPES and _works(x.device, x.dtype)


@functools.cache
def _works(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether a product compiles on the device and is right; why not is said once."""
    try:
        from llama_dist.kernels.triton_linear import linear

        eye = torch.eye(16, dtype=dtype, device=device)
        with torch.cuda.device_of(eye):  # type: ignore[no-untyped-call]
            if not torch.equal(linear(eye, eye), eye):
                raise ArithmeticError("its product of two unit matrices is wrong")
    except Exception as err:  # no Triton, no C compiler for its launcher, a device it does not know: of many types
        log.info("computing with torch's own operations: Triton does not serve: %s", " ".join(str(err).split())[:300])
        return False
    return True


def build_name() -> str:
    """What the compiled kernels' bits depend on, beside the device: a digest of their sources, and the compiler."""
    digest = hashlib.blake2b(digest_size=4)
    for source in sorted(Path(__file__).parent.glob("triton_*.py")):
        digest.update(source.read_bytes() + b"\0")
    return f"Triton kernels {digest.hexdigest()} (triton {importlib.metadata.version('triton')})"
