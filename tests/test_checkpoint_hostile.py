"""Damaged and hostile files: each is refused in one line that says what is wrong, in under 2 s and 300 MB.

All cases are opened by one child process, which measures itself; a test per case reads what it found.
"""

from __future__ import annotations

import json
import os
import pickle
import random
import re
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from llama_dist.checkpoint.open import open_checkpoint
from llama_dist.errors import CheckpointError
from tests import tiny

LLAMA = tiny.CASES["llama-meta"]
WQ = "layers.1.attention.wq.weight"
HF_WQ = "model.layers.1.self_attn.q_proj.weight"

Maker = Callable[[Path], None]
CASES: dict[str, tuple[Maker, str]] = {}
"""What each makes in an empty folder, and a part of the message it must give."""


def case(message: str, name: str | None = None) -> Callable[[Maker], Maker]:
    def add(make: Maker) -> Maker:
        CASES[name or make.__name__] = (make, message)
        return make

    return add


# Meta


def meta(folder: Path, change: Callable[[dict[str, Any]], object] = lambda state: None) -> Path:
    """A sound one-file checkpoint but for `change` to its tensors."""
    tiny.save_meta(LLAMA, folder)
    state: dict[str, Any] = {name: value for name, (value, _) in tiny.meta_state(LLAMA).items()}
    change(state)
    torch.save(state, folder / "consolidated.00.pth")
    return folder / "consolidated.00.pth"


def add_tensor_case(name: str, message: str, change: Callable[[dict[str, Any]], object]) -> None:
    case(message, f"pth_{name}")(lambda folder: meta(folder, change) and None)


add_tensor_case("missing", f"1 of 21 tensors missing: {WQ}", lambda s: s.pop(WQ))
add_tensor_case("extra", "not account for: layers.7.x", lambda s: s.update({"layers.7.x": torch.ones(2)}))
add_tensor_case("shape", f"{WQ} has shape [64, 63]", lambda s: s.update({WQ: torch.ones(64, 63)}))
add_tensor_case("rank", f"{WQ} has shape [64]", lambda s: s.update({WQ: torch.ones(64)}))
add_tensor_case("norm_shape", "norm.weight has shape [63]", lambda s: s.update({"norm.weight": torch.ones(63)}))
add_tensor_case("int8", f"{WQ} is stored as CharStorage", lambda s: s.update({WQ: torch.ones(64, 64).char()}))
add_tensor_case("complex", "is stored as ComplexFloatStorage", lambda s: s.update({WQ: torch.ones(64, 64).cfloat()}))
add_tensor_case("double", "is stored as DoubleStorage", lambda s: s.update({WQ: torch.ones(64, 64).double()}))
add_tensor_case(
    "sparse", f"{WQ} is stored as torch._utils._rebuild_sparse", lambda s: s.update({WQ: s[WQ].to_sparse()})
)
add_tensor_case("no_tensor", f"{WQ} is stored as list", lambda s: s.update({WQ: [1, 2]}))
add_tensor_case("transposed", f"{WQ} is not contiguous", lambda s: s.update({WQ: s[WQ].T}))
add_tensor_case(
    "stride_0", "output.weight is not contiguous", lambda s: s.update({"output.weight": torch.ones(1).expand(10**9, 1)})
)
add_tensor_case(
    "stride_0_right_shape", f"{WQ} is not contiguous", lambda s: s.update({WQ: torch.ones(1).expand(64, 64)})
)


class _Runs:
    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


add_tensor_case("system", "asks for posix.system", lambda s: s.update({WQ: _Runs(os.system, "touch owned")}))
add_tensor_case("eval", "asks for .*builtin.*eval", lambda s: s.update({WQ: _Runs(eval, "1")}))
add_tensor_case("getattr", "asks for .*builtin.*getattr", lambda s: s.update({WQ: _Runs(getattr, 1, "real")}))


def archive(folder: Path, data: bytes, compression: int = zipfile.ZIP_STORED, **entries: bytes) -> Path:
    """A zip as torch.save lays it out, around a given pickle."""
    tiny.save_meta(LLAMA, folder)
    path = folder / "consolidated.00.pth"
    with zipfile.ZipFile(path, "w", compression) as out:
        out.writestr("x/data.pkl", data)
        out.writestr("x/version", b"3\n")
        for name, value in entries.items():
            out.writestr(f"x/{name}", value)
    return path


def add_pickle_case(name: str, message: str, data: bytes) -> None:
    case(message, f"pkl_{name}")(lambda folder: archive(folder, data) and None)


add_pickle_case("bytearray_of_10_GB", "builtin", b"\x80\x02c__builtin__\nbytearray\n\x8a\x05\x00\xe4\x0b\x54\x02\x85R.")
add_pickle_case("bytearray_opcode", "data.pkl is refused", b"\x80\x05\x96\x00\x00\x00\x00\x80\x00\x00\x00.")
add_pickle_case("memo_index", "holds a int", b"\x80\x02K\x01r\xff\xff\xff\x7f.")
add_pickle_case("empty", "data.pkl is refused", b"")
add_pickle_case("no_dict", "holds a list", b"\x80\x02].")
add_pickle_case("keys_no_text", "holds a dict", b"\x80\x02}K\x01K\x02s.")
add_pickle_case("long_text", "data.pkl is refused", b"\x80\x02X\xff\xff\xff\x7fabc.")
add_pickle_case("deep", "data.pkl is refused", b"\x80\x02" + b"(" * 500_000)
add_pickle_case("deep_list", "holds a tuple", b"\x80\x02" + b"]" + b"\x85" * 500_000 + b".")
add_pickle_case("many_dicts", "21 of 21 tensors missing", b"\x80\x02" + b"}" * 500_000 + b".")
add_pickle_case("too_long", "at most", b"\x80\x02" + b"}" * 600_000 + b".")
add_pickle_case(
    "copies", "data.pkl is refused", b"\x80\x02}q\x00" + b"ccollections\nOrderedDict\nh\x00\x85R" * 15000 + b"."
)
add_pickle_case(
    "build_on_a_function", "tensors missing", b"\x80\x02}(X\x01\x00\x00\x00actorch._utils\n_rebuild_tensor_v2\n}bu."
)
add_pickle_case(
    "storage_missing",
    "its storage 9 is not in the archive",
    pickle.PROTO
    + b"\x02}X\x01\x00\x00\x00actorch._utils\n_rebuild_tensor_v2\n((X\x07\x00\x00\x00storagectorch\nFloatStorage\n"
    + b"X\x01\x00\x00\x009X\x03\x00\x00\x00cpuK\x01tQK\x00K\x01\x85K\x01\x85\x89NtRs.",
)


@case("damaged zip|no zip directory|is no zip archive|beyond the file", "pth_truncated_to_half")
def _(folder: Path) -> None:
    cut(meta(folder), 0.5)


@case("is no zip archive|no zip directory", "pth_truncated_to_3_bytes")
def _(folder: Path) -> None:
    cut(meta(folder), 3)


@case("is no zip archive", "pth_empty")
def _(folder: Path) -> None:
    cut(meta(folder), 0)


@case("no zip directory", "pth_truncated_by_1_byte")
def _(folder: Path) -> None:
    cut(meta(folder), -1)


@case("damaged|beyond the file|no header", "pth_middle_missing")
def _(folder: Path) -> None:
    path = meta(folder)
    data = path.read_bytes()
    path.write_bytes(data[:2000] + data[-3000:])


@case("is no zip archive", "pth_old_format")
def _(folder: Path) -> None:
    torch.save({"a": torch.ones(2)}, meta(folder), _use_new_zipfile_serialization=False)


@case("entry x/data.pkl is compressed", "pth_zip_bomb")
def _(folder: Path) -> None:
    archive(folder, b"}" * 50_000_000, zipfile.ZIP_DEFLATED)


@case("zip directory has", "pth_million_entries")
def _(folder: Path) -> None:
    path = archive(folder, b"\x80\x02}.")
    data = path.read_bytes()
    at = data.index(b"PK\1\2")
    entry = data[at : data.index(b"PK\1\2", at + 1)]
    end = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 65535, 65535, len(entry) * 10**6, at, 0)
    path.write_bytes(data[:at] + entry * 10**6 + end)


@case("more than its storage", "pth_storage_too_small")
def _(folder: Path) -> None:
    path = meta(folder)
    with zipfile.ZipFile(path) as old:
        entries = {info.filename: old.read(info) for info in old.infolist()}
    with zipfile.ZipFile(path, "w") as out:
        for name, data in entries.items():
            out.writestr(name, data[:100] if "/data/" in name else data)


@case("big-endian", "pth_big_endian")
def _(folder: Path) -> None:
    archive(folder, b"\x80\x02}.", byteorder=b"big")


@case("no data.pkl", "pth_plain_zip")
def _(folder: Path) -> None:
    with zipfile.ZipFile(meta(folder), "w") as out:
        out.writestr("a", "b")


@case("layers.1.attention.wq.weight is BF16, but F32", "meta_files_of_two_types")
def _(folder: Path) -> None:
    tiny.save_meta(LLAMA, folder, 2)
    path = folder / "consolidated.01.pth"
    state = torch.load(path, weights_only=True)
    torch.save(state | {WQ: state[WQ].bfloat16()}, path)


@case("layers.1.feed_forward.w2.weight has shape", "meta_files_of_two_sizes")
def _(folder: Path) -> None:
    tiny.save_meta(LLAMA, folder, 2)
    path = folder / "consolidated.01.pth"
    state = torch.load(path, weights_only=True)
    torch.save(state | {"layers.1.feed_forward.w2.weight": torch.ones(64, 70)}, path)


@case("n_layers", "params_huge")
def _(folder: Path) -> None:
    meta(folder)
    (folder / "params.json").write_text(json.dumps(tiny.params_json(LLAMA) | {"n_layers": 2**30}))


# safetensors


def hf(folder: Path, shards: int = 1) -> Path:
    tiny.save_hf(LLAMA, folder, shards=shards)
    return folder / "model.safetensors"


def header_case(name: str, message: str, change: Callable[[dict[str, Any]], object]) -> None:
    """A sound file but for its header's entries."""

    def make(folder: Path) -> None:
        path = hf(folder)
        data = path.read_bytes()
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length])
        change(header)
        write_safetensors(path, json.dumps(header).encode(), data[8 + length :])

    case(message, f"st_{name}")(make)


def write_safetensors(path: Path, header: bytes, data: bytes = b"") -> None:
    path.write_bytes(struct.pack("<Q", len(header)) + header + data)


header_case("missing", f"1 of 21 tensors missing: {HF_WQ}", lambda h: h.pop(HF_WQ))
header_case(
    "extra", "not account for: more", lambda h: h.update(more=h[HF_WQ] | {"data_offsets": [0, 0], "shape": [0]})
)
header_case("shape", f"{HF_WQ} has shape [32, 128]", lambda h: h[HF_WQ].update(shape=[32, 128]))
header_case("size", f"{HF_WQ}: F32 of shape", lambda h: h[HF_WQ].update(shape=[64, 63]))
header_case("dtype", f"{HF_WQ} is stored as I32", lambda h: h[HF_WQ].update(dtype="I32"))
header_case("unknown_dtype", f"{HF_WQ} is stored as Q7", lambda h: h[HF_WQ].update(dtype="Q7"))
header_case("no_dtype", f"{HF_WQ}: .* is not a dtype", lambda h: h[HF_WQ].pop("dtype"))
header_case("negative", "is not a dtype", lambda h: h[HF_WQ].update(data_offsets=[-4, 16380]))
header_case("backwards", "is not a dtype", lambda h: h[HF_WQ].update(data_offsets=[16384, 0]))
header_case("offsets_no_numbers", "is not a dtype", lambda h: h[HF_WQ].update(data_offsets=[0.0, True]))
header_case("huge_shape", f"{HF_WQ}: F32 of shape", lambda h: h[HF_WQ].update(shape=[2**62, 2**62]))
header_case("past_the_end", "after the file", lambda h: h[HF_WQ].update(data_offsets=[2**40, 2**40 + 16384]))
header_case("entry_no_object", "is not a dtype", lambda h: h.update({HF_WQ: 7}))
header_case(
    "overlap",
    "overlap",
    lambda h: h[HF_WQ].update(data_offsets=h["model.layers.0.self_attn.q_proj.weight"]["data_offsets"]),
)


def raw_header_case(name: str, message: str, data: bytes) -> None:
    case(message, f"st_{name}")(lambda folder: hf(folder).write_bytes(data) and None)


def json_case(name: str, message: str, header: bytes) -> None:
    raw_header_case(name, message, struct.pack("<Q", len(header)) + header)


raw_header_case("header_of_2_60", "the header claims", struct.pack("<Q", 2**60) + b"{}")
raw_header_case("7_bytes", "has 7 bytes", b"1234567")
raw_header_case("header_past_end", "the header claims", struct.pack("<Q", 100) + b"{}")
json_case("header_too_long", "the header claims", b"{" + b" " * (9 * 2**20) + b"}")
json_case("header_of_lists", "must be an object", b"[" + b"[]," * 1_300_000 + b"[]]")
json_case("nan", "NaN", b'{"a": NaN}')
json_case("nesting", "nested too deeply", b"[" * 1000000)
json_case("nested_objects", "nested too deeply", b'{"a":' * 1000000)
json_case("not_utf8", "no usable JSON", b'{"\xff": 1}')
json_case("twice", "twice", b'{"a": 1, "a": 2}')
json_case("no_object", "must be an object", b"[]")
json_case("digits", "no usable JSON|is not a dtype", b'{"a": ' + b"9" * 100000 + b"}")
json_case("newlines", r"a\\nb", b'{"a\\nb": 1}')

for size in (5, 20, 0.01, 0.3, 0.999, -1):

    @case("truncated", f"st_cut_{size}")
    def _(folder: Path, size: float = size) -> None:
        cut(hf(folder), size)


def index_case(name: str, message: str, change: Callable[[dict[str, Any]], object]) -> None:
    def make(folder: Path) -> None:
        hf(folder, 2)
        path = folder / "model.safetensors.index.json"
        index = json.loads(path.read_text())
        change(index)
        path.write_text(json.dumps(index))

    case(message, f"index_{name}")(make)


for odd in ("../secret.safetensors", "/etc/passwd", "sub/a.safetensors", "..", "", "a\n.safetensors", 7, None, ["x"]):
    index_case(f"of_{odd!r}", f"{HF_WQ} is said to be in", lambda i, odd=odd: i["weight_map"].update({HF_WQ: odd}))
index_case(
    "file_missing",
    "cannot open|index.json does not account for",
    lambda i: i["weight_map"].update({HF_WQ: "gone.safetensors"}),
)
index_case("wrong_file", "index.json does not account for: " + HF_WQ, lambda i: swap(i["weight_map"]))
index_case("lists_less", "index.json does not account for: " + HF_WQ, lambda i: i["weight_map"].pop(HF_WQ))
index_case("lists_more", "1 of .* tensors missing: more", lambda i: i["weight_map"].update(more=i["weight_map"][HF_WQ]))
index_case("empty", "weight_map", lambda i: i.update(weight_map={}))
index_case("no_map", "weight_map", lambda i: i.update(weight_map=[1]))


def swap(weight_map: dict[str, str]) -> None:
    weight_map[HF_WQ] = next(file for file in weight_map.values() if file != weight_map[HF_WQ])


def config_case(name: str, message: str, text: bytes) -> None:
    case(message, f"config_{name}")(lambda folder: (hf(folder).parent / "config.json").write_bytes(text) and None)


config_case("nan", "Infinity is not JSON", b'{"rms_norm_eps": Infinity}')
config_case("nesting", "nested too deeply", b'{"a":' * 100000)
config_case("not_utf8", "no usable JSON", b"\xff\xfe{}")
config_case("empty", "no usable JSON", b"")
config_case("too_long", "more than a config", b" " * 9 * 2**20)
config_case("no_model", "architecture 'none'", b"{}")
config_case("no_shapes", "'num_hidden_layers' is missing", b'{"architectures": ["LlamaForCausalLM"]}')


@case("n_heads 8 is not a multiple of n_kv_heads 3", "config_heads")
def _(folder: Path) -> None:
    hf(folder)
    (folder / "config.json").write_text(json.dumps(tiny.config_json(LLAMA) | {"num_key_value_heads": 3}))


@case("not a regular file|cannot open", "config_is_a_pipe")
def _(folder: Path) -> None:
    hf(folder)
    (folder / "config.json").unlink()
    os.mkfifo(folder / "config.json")


# GGUF


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
        cut(tiny.save_gguf(LLAMA, folder / "m.gguf"), size)


def gguf_tensor_case(name: str, message: str, old: bytes, new: bytes) -> None:
    """A sound file with some bytes of its header exchanged."""

    def make(folder: Path) -> None:
        path = tiny.save_gguf(LLAMA, folder / "m.gguf")
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


def cut(path: Path, to: float) -> None:
    """Keep `to` bytes, or that part of them; below 0: leave so many off the end."""
    size = path.stat().st_size
    keep = size + to if to < 0 else size * to if isinstance(to, float) else to
    with open(path, "r+b") as file:
        file.truncate(int(keep))


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
    done = subprocess.run([sys.executable, "-c", CHILD, *folders], capture_output=True, text=True, cwd=root)
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


def test_the_sound_files_are_accepted(tmp_path: Path) -> None:
    """So that the cases above are refused for what they change."""
    for make in (meta, hf):
        (tmp_path / make.__name__).mkdir()
        make(tmp_path / make.__name__)
        open_checkpoint(tmp_path / make.__name__).close()
    open_checkpoint(tiny.save_gguf(LLAMA, tmp_path / "m.gguf")).close()


@pytest.mark.parametrize("form", ["meta", "hf", "gguf"])
def test_flipped_bytes_never_raise_anything_else(tmp_path: Path, form: str) -> None:
    """Random damage to a header: a CheckpointError, or a reader whose every tensor can be read."""
    if form == "gguf":
        path = tiny.save_gguf(LLAMA, tmp_path / "m.gguf")
    else:
        path = {"meta": meta, "hf": hf}[form](tmp_path)
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
