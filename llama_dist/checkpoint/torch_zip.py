"""A `.pth` file written front to back: one tensor after another, none of them whole in memory.

The layout is that of `torch.save` since 1.6 (torch/serialization.py): an uncompressed zip with a pickle that names the
tensors, and each tensor's bytes in a file of its own, begun at a multiple of 64 so that `torch.load(mmap=True)` works.
"""

from __future__ import annotations

import io
import math
import pickle
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch

ALIGNMENT = 64
_ROOT = "archive"
_HEADER = 30
_ZIP64_FIELD = 20
_STORAGES = {
    torch.float32: torch.FloatStorage,
    torch.float16: torch.HalfStorage,
    torch.bfloat16: torch.BFloat16Storage,
}


@dataclass(frozen=True)
class _Storage:
    dtype: torch.dtype
    key: str
    numel: int


@dataclass(frozen=True)
class _Tensor:
    storage: _Storage
    shape: tuple[int, ...]

    def __reduce__(self) -> tuple[Any, ...]:
        stride = tuple(math.prod(self.shape[n + 1 :]) for n in range(len(self.shape)))
        return torch._utils._rebuild_tensor_v2, (self.storage, 0, self.shape, stride, False, OrderedDict())


class _Pickler(pickle.Pickler):
    def persistent_id(self, obj: Any) -> Any:
        if isinstance(obj, _Storage):
            return "storage", _STORAGES[obj.dtype], obj.key, "cpu", obj.numel
        return None


class TorchZip:
    """One file under construction. `tensors` gives name, shape and dtype in the order in which they will be written.

    Example, a file of one vector:
        with TorchZip(path, {"norm.weight": ((2,), torch.float32)}) as file, file.tensor("norm.weight") as out:
            out.write(bytes(8))
    """

    def __init__(self, path: Path, tensors: Mapping[str, tuple[tuple[int, ...], torch.dtype]]) -> None:
        self._sizes: dict[str, tuple[str, int]] = {}
        table: dict[str, _Tensor] = {}
        for index, (name, (shape, dtype)) in enumerate(tensors.items()):
            numel = math.prod(shape)
            table[name] = _Tensor(_Storage(dtype, str(index), numel), shape)
            self._sizes[name] = f"data/{index}", numel * dtype.itemsize
        pickled = io.BytesIO()
        _Pickler(pickled, protocol=2).dump(table)
        self._zip = zipfile.ZipFile(path, "x", zipfile.ZIP_STORED, allowZip64=True)
        self._member("data.pkl", pickled.getvalue())
        self._member("byteorder", sys.byteorder.encode())

    def tensor(self, name: str) -> IO[bytes]:
        """Where the bytes of one tensor go; close it before the next. All of them must be written, in order."""
        return self._open(*self._sizes[name])

    def _member(self, name: str, data: bytes) -> None:
        with self._open(name, len(data)) as out:
            out.write(data)

    def _open(self, name: str, size: int) -> IO[bytes]:
        info = zipfile.ZipInfo(f"{_ROOT}/{name}")  # dated 1980: the same tensors make the same bytes
        info.file_size = size
        large = size * 1.05 > zipfile.ZIP64_LIMIT  # where zipfile itself begins to write 64-bit sizes
        begin = self._zip.start_dir + _HEADER + len(info.filename) + (_ZIP64_FIELD if large else 0)
        padding = -(begin + 4) % ALIGNMENT
        info.extra = b"FB" + padding.to_bytes(2, "little") + b"Z" * padding
        return self._zip.open(info, "w", force_zip64=large)

    def __enter__(self) -> TorchZip:
        return self

    def __exit__(self, kind: object, *rest: object) -> None:
        if kind is None:
            self._member("version", b"3\n")
        self._zip.close()
