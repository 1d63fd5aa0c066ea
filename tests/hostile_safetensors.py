"""Hostile safetensors files, indexes and config.json."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests import tiny
from tests.hostile import LLAMA, case, cut

HF_WQ = "model.layers.1.self_attn.q_proj.weight"


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
json_case("nested_objects", "nested too deeply", b'{"a":' * 500000)
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
