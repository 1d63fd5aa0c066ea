"""Hostile GGUF files."""

from __future__ import annotations

import struct
from pathlib import Path

from tests import tiny
from tests.hostile import LLAMA, case, cut


def sound(folder: Path) -> Path:
    return tiny.save_gguf(LLAMA, folder / "m.gguf")


def gguf_file(*parts: bytes, tensors: int = 0, keys: int = 0, version: int = 3) -> bytes:
    return struct.pack("<4sIQQ", b"GGUF", version, tensors, keys) + b"".join(parts)


def text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


def array(kind: int, count: int, data: bytes = b"") -> bytes:
    return text(b"a") + struct.pack("<IIQ", 9, kind, count) + data


def tensor(name: bytes, dims: list[int], kind: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


def gguf_case(name: str, message: str, data: bytes) -> None:
    case(message, f"gguf_{name}")(lambda folder: (folder / "m.gguf").write_bytes(data) and None)


def lot(item: bytes, count: int) -> bytes:
    return item * count


gguf_case("2_40_tensors", "claims", gguf_file(tensors=2**40))
gguf_case("2_64_keys", "claims", gguf_file(keys=2**64 - 1))
gguf_case("2_40_items", "claims 1099511627776 items", gguf_file(array(4, 2**40), keys=1))
gguf_case("2_40_strings", "claims 1099511627776 items", gguf_file(array(8, 2**40), keys=1))
gguf_case("2_64_bytes", "truncated or damaged", gguf_file(array(0, 2**64 - 1), keys=1)[:30])
gguf_case("10M_bytes", "claims 10000000 items", gguf_file(array(0, 10**7, bytes(10**7)), keys=1))
gguf_case("2M_empty_strings", "architecture 'None'", gguf_file(array(8, 1_900_000, lot(text(b""), 1_900_000)), keys=1))
gguf_case("2M_strings", "architecture 'None'", gguf_file(array(8, 1_900_000, lot(text(b"ab"), 1_900_000)), keys=1))
gguf_case("nested_arrays", "array of type 9", gguf_file(array(9, 1, lot(struct.pack("<IQ", 9, 1), 10**6)), keys=1))
gguf_case("string_past_end", "truncated or damaged", gguf_file(text(b"k") + struct.pack("<IQ", 8, 2**62), keys=1))
gguf_case(
    "strings_past_end", "truncated or damaged", gguf_file(array(8, 2, text(b"x") + struct.pack("<Q", 2**62)), keys=1)
)
gguf_case("key_not_utf8", "not UTF-8", gguf_file(text(b"\xff") + struct.pack("<IB", 0, 1), keys=1))
gguf_case("tokens_not_utf8", "not UTF-8", gguf_file(array(8, 1, text(b"\xff")), keys=1))
gguf_case("unknown_value_type", "unknown type 77", gguf_file(text(b"k") + struct.pack("<I", 77), keys=1))
gguf_case("key_twice", "k appears twice", gguf_file(*[text(b"k") + struct.pack("<IB", 0, 1)] * 2, keys=2))
gguf_case("alignment", "general.alignment", gguf_file(text(b"general.alignment") + struct.pack("<II", 4, 0), keys=1))
gguf_case("version_1", "version 1 ", gguf_file(version=1))
gguf_case("big_endian", "version 50331648 ", gguf_file(version=3 << 24))
gguf_case("tensor_overflow", "truncated", gguf_file(tensor(b"t", [2**32, 2**32, 2**32, 1]), tensors=1))
gguf_case("tensor_2_64", "truncated", gguf_file(tensor(b"t", [2**63, 2]), tensors=1))
gguf_case("tensor_offset", "truncated", gguf_file(tensor(b"t", [1], offset=2**63), tensors=1))
gguf_case("tensor_unaligned", "alignment", gguf_file(tensor(b"t", [1], offset=1), bytes(64), tensors=1))
gguf_case("tensor_dims", "has 9 dimensions", gguf_file(tensor(b"t", [1] * 9), tensors=1))
gguf_case("tensor_2_31_dims", "dimensions", gguf_file(text(b"t") + struct.pack("<I", 2**31), tensors=1))
gguf_case("tensor_blocks", "multiple of Q8_0's 32", gguf_file(tensor(b"t", [33], 8), bytes(99), tensors=1))
gguf_case("tensor_twice", "t appears twice", gguf_file(*[tensor(b"t", [1])] * 2, bytes(99), tensors=2))
gguf_case("tensor_overlap", "overlap", gguf_file(tensor(b"t", [9]), tensor(b"u", [9]), bytes(99), tensors=2))
gguf_case("wrong_magic", "not a GGUF", b"GGML" + bytes(100))
gguf_case("empty", "not a GGUF", b"")

for size in (3, 23, 24, 100, 0.05, 0.2, 0.9, -1):

    @case("truncated|not a GGUF", f"gguf_cut_{size}")
    def _(folder: Path, size: float = size) -> None:
        cut(sound(folder), size)


def gguf_tensor_case(name: str, message: str, old: bytes, new: bytes) -> None:
    """A sound file with some bytes of its header exchanged."""

    def make(folder: Path) -> None:
        path = sound(folder)
        data = path.read_bytes()
        assert data.count(old) == 1
        path.write_bytes(data.replace(old, new))

    case(message, f"gguf_{name}")(make)


Q1 = b"blk.1.attn_q.weight"
Q1_INFO = Q1 + struct.pack("<IQQI", 2, 64, 64, 0)
gguf_tensor_case(
    "tensor_renamed",
    "1 of 21 tensors missing: blk.1.attn_q.weight; 1 tensors .*: blk.1.attn_x.weight",
    Q1,
    Q1.replace(b"_q", b"_x"),
)
gguf_tensor_case(
    "tensor_shape", "blk.1.attn_q.weight has shape [32, 64]", Q1_INFO, Q1 + struct.pack("<IQQI", 2, 64, 32, 0)
)
gguf_tensor_case(
    "tensor_int", "blk.1.attn_q.weight is stored as I32", Q1_INFO, Q1 + struct.pack("<IQQI", 2, 64, 64, 26)
)
gguf_tensor_case("tensor_iq", "stored as IQ4_NL, must be F32, F16", Q1_INFO, Q1 + struct.pack("<IQQI", 2, 64, 64, 20))
gguf_tensor_case("tensor_type_99", "stored as type 99", Q1_INFO, Q1 + struct.pack("<IQQI", 2, 64, 64, 99))
