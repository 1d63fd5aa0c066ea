"""The header of a GGUF file: metadata and where each tensor lies.

Layout (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md), little-endian: magic, version, two counts,
key-value pairs, tensor infos, then data at a multiple of `general.alignment`. Every count and length is a stranger's
number, so each is held against the bytes that are left before anything is done with it; the `gguf` package's reader
is not, and takes 49,000 tokens apart one numpy array at a time.
"""

from __future__ import annotations

import itertools
import math
import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from llama_dist.checkpoint.check import name_some
from llama_dist.checkpoint.files import File
from llama_dist.checkpoint.stored import BF16, F16, F32, Encoding, Stored
from llama_dist.errors import CheckpointError
from llama_dist.kernels.blocks import KINDS

MAX_ITEMS = 2_000_000
"""Array items of a whole file: the largest vocabularies have 256 thousand tokens and twice as many merges."""
MAX_ENTRIES = 2**16
"""Keys, and tensors, of a file."""
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
READABLE = f"F32, F16, BF16, {', '.join([*KINDS][:-1])} or {[*KINDS][-1]}"
ENCODINGS: Mapping[int, Encoding] = {0: F32, 1: F16, 30: BF16} | {
    kind.number: Encoding(name, torch.float32, kind.numbers, kind.n_bytes, kind) for name, kind in KINDS.items()
}
"""By their numbers in a file the types that are read."""
_U32, _U64 = struct.Struct("<I"), struct.Struct("<Q")


@dataclass(frozen=True)
class Header:
    """`metadata` as plain Python values, `tensors` by their name in the file with shapes as torch writes them."""

    metadata: dict[str, Any]
    tensors: dict[str, Stored]


def read_gguf_header(file: File) -> Header:
    """Parse and check the whole header; CheckpointError says what is damaged, absurd or of another version."""
    if file.size < 24 or file.read(0, 4) != b"GGUF":
        raise CheckpointError(f"{file.path} is not a GGUF file: it does not begin with GGUF, or is truncated")
    with open(file.path, "rb") as handle, mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ) as memory:
        return _Scanner(file, memory).header()


def read_metadata(path: Path) -> dict[str, Any] | None:
    """The metadata of the GGUF at `path`, None if that is no file that begins as one. CheckpointError if damaged."""
    if not path.is_file():
        return None
    file = File(path)
    try:
        return read_gguf_header(file).metadata if file.size >= 4 and file.read(0, 4) == b"GGUF" else None
    finally:
        file.close()


class _Scanner:
    """A position in the mapped header that never passes the end of the file."""

    def __init__(self, file: File, memory: mmap.mmap) -> None:
        self.file, self.memory, self.at, self.items = file, memory, 4, 0

    def fail(self, reason: str) -> CheckpointError:
        return CheckpointError(f"{self.file.path}: {reason}")

    def header(self) -> Header:
        version = self.u32()
        if version not in (2, 3):
            raise self.fail(f"GGUF version {version} is not supported, only little-endian 2 and 3")
        n_tensors, n_keys = self.u64(), self.u64()
        if n_tensors > MAX_ENTRIES or n_keys > MAX_ENTRIES:
            raise self.fail(f"the header claims {n_tensors} tensors and {n_keys} keys, at most {MAX_ENTRIES} are read")
        metadata: dict[str, Any] = {}
        for _ in range(n_keys):
            key = self.string()
            if key in metadata:
                raise self.fail(f"key {name_some([key])} appears twice")
            metadata[key] = self.value(key)
        infos = [self.tensor_info() for _ in range(n_tensors)]
        alignment = metadata.get("general.alignment", 32)
        if type(alignment) is not int or alignment < 1 or alignment > 2**20 or alignment & (alignment - 1):
            raise self.fail(f"general.alignment is {str(alignment)[:40]}, must be a power of two up to 2**20")
        begin = -(-self.at // alignment) * alignment
        return Header(metadata, self.place(infos, begin, alignment))

    def take(self, size: int) -> int:
        """Step over `size` bytes and give where they begin."""
        at = self.at
        if size > self.file.size - at:
            raise self.fail(f"the header needs {size} bytes at byte {at} of {self.file.size}: truncated or damaged")
        self.at = at + size
        return at

    def u32(self) -> int:
        return int(_U32.unpack_from(self.memory, self.take(4))[0])

    def u64(self) -> int:
        return int(_U64.unpack_from(self.memory, self.take(8))[0])

    def string(self) -> str:
        at = self.take(self.u64())
        try:
            return str(self.memory[at : self.at], "utf-8")
        except UnicodeDecodeError:
            raise self.fail(f"the string at byte {at} is not UTF-8") from None

    def value(self, key: str) -> Any:
        kind = self.u32()
        if kind == _STRING:
            return self.string()
        if kind in _SCALARS:
            return self.numbers(_SCALARS[kind], 1)[0]
        if kind != _ARRAY:
            raise self.fail(f"key {name_some([key])} has the unknown type {kind}")
        kind, count = self.u32(), self.u64()
        if kind != _STRING and kind not in _SCALARS:
            raise self.fail(f"key {name_some([key])} is an array of type {kind}, only strings and numbers are read")
        smallest = 8 if kind == _STRING else struct.calcsize(_SCALARS[kind])
        self.items += count
        if count > (self.file.size - self.at) // smallest or self.items > MAX_ITEMS:
            raise self.fail(f"key {name_some([key])} claims {count} items, more than the file or {MAX_ITEMS} in all")
        return self.strings(count) if kind == _STRING else list(self.numbers(_SCALARS[kind], count))

    def numbers(self, code: str, count: int) -> tuple[Any, ...]:
        return struct.unpack_from(f"<{count}{code}", self.memory, self.take(count * struct.calcsize(code)))

    def strings(self, count: int) -> list[str]:
        # Inlined `string`: vocabularies have hundreds of thousands of these.
        memory, size, at, out = self.memory, self.file.size, self.at, []
        try:
            for _ in range(count):
                begin = at + 8
                at = begin + _U64.unpack_from(memory, at)[0]
                if at > size:
                    break
                out.append(str(memory[begin:at], "utf-8"))
        except struct.error:
            at = size + 1
        except UnicodeDecodeError:
            raise self.fail(f"the string at byte {begin} is not UTF-8") from None
        self.take(at - self.at)
        return out

    def tensor_info(self) -> tuple[str, list[int], int, int]:
        name, n_dims = self.string(), self.u32()
        if not 1 <= n_dims <= 4:
            raise self.fail(f"tensor {name_some([name])} has {n_dims} dimensions, must have 1 to 4")
        dims = list(self.numbers("Q", n_dims))
        return name, dims, self.u32(), self.u64()

    def place(self, infos: list[tuple[str, list[int], int, int]], begin: int, alignment: int) -> dict[str, Stored]:
        tensors: dict[str, Stored] = {}
        spans = []
        for name, dims, kind, offset in infos:
            label = f"tensor {name_some([name])}"
            if name in tensors:
                raise self.fail(f"{label} appears twice")
            if offset % alignment:
                raise self.fail(f"{label} is at byte {offset}, not a multiple of the alignment {alignment}")
            encoding = ENCODINGS.get(kind)
            size = 0
            if encoding is not None:
                if dims[0] % encoding.block:
                    raise self.fail(
                        f"{label} has rows of {dims[0]}, not a multiple of {encoding.name}'s {encoding.block}"
                    )
                size = encoding.row_bytes(math.prod(dims))
            if begin + offset + size > self.file.size:
                raise self.fail(f"{label} ends at byte {begin + offset + size} of {self.file.size}: truncated")
            # Dimensions come fastest first, and 1s may be left at the end.
            while len(dims) > 2 and dims[-1] == 1:
                dims.pop()
            tensors[name] = Stored(self.file, begin + offset, tuple(reversed(dims)), kind_name(kind), encoding)
            spans.append((offset, offset + size, name))
        spans.sort()
        for (_, stop, one), (start, _, other) in itertools.pairwise(spans):
            if start < stop:
                raise self.fail(f"tensors {name_some([one, other])} overlap")
        return tensors


def kind_name(kind: int) -> str:
    """GGUF's name of a storage type, or its number where the package knows none."""
    from gguf import GGMLQuantizationType  # which no file that is read should wait for

    try:
        return str(GGMLQuantizationType(kind).name)
    except ValueError:
        return f"type {kind}"
