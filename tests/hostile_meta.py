"""Hostile .pth files and params.json."""

from __future__ import annotations

import json
import os
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tests import tiny
from tests.hostile import LLAMA, case, cut

WQ = "layers.1.attention.wq.weight"


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
