"""Every reader against a plain load of the same tensors: whole, any slice of any dimension, in pieces, in bounds."""

from __future__ import annotations

import json
import os
import random
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import safetensors.torch
import torch

from llama_dist.checkpoint import stored, table
from llama_dist.checkpoint.files import File
from llama_dist.checkpoint.open import open_checkpoint
from llama_dist.checkpoint.reader import Reader
from llama_dist.checkpoint.safetensors import read_header
from llama_dist.errors import CheckpointError
from llama_dist.model.families import gguf_name, hf_name, tensor_shapes
from llama_dist.model.hf_config import parse_hf_config
from tests import tiny

HALVES = tiny.CASES["llama-meta"]  # 8 heads, 4 KV heads of 8


def gather(reader: Reader, name: str, dim: int = 0, start: int = 0, stop: int | None = None) -> torch.Tensor:
    """All pieces, each copied before the next is asked for, as the contract says."""
    pieces = [piece.clone() for piece in reader.read(name, dim, start, stop)]
    info = reader.tensors[name]
    assert all(piece.dtype == info.dtype and piece.nbytes <= 64 * 2**20 for piece in pieces)
    if not pieces:
        return torch.empty([0 if i == dim else n for i, n in enumerate(info.shape)], dtype=info.dtype)
    return torch.cat(pieces)


def slices(size: int, draw: random.Random) -> Iterator[tuple[int, int | None]]:
    yield from ((0, None), (0, size), (0, 1), (size - 1, size), (size // 2, size // 2))
    for _ in range(3):
        start = draw.randrange(size)
        yield start, draw.randrange(start, size + 1)


def assert_same(reader: Reader, want: dict[str, torch.Tensor]) -> None:
    """`want` by logical name. Every tensor whole, and slices of each of its dimensions."""
    assert set(reader.tensors) == set(want) == set(tensor_shapes(reader.config))
    draw = random.Random(7)
    for name, tensor in want.items():
        assert reader.tensors[name].shape == tuple(tensor.shape) and reader.tensors[name].dtype == tensor.dtype
        for dim in range(tensor.ndim):
            for start, stop in slices(tensor.shape[dim], draw):
                length = (tensor.shape[dim] if stop is None else stop) - start
                got = gather(reader, name, dim, start, stop)
                assert torch.equal(got, tensor.narrow(dim, start, length)), (name, dim, start, stop)
    assert sum(reader.storage.values()) == len(want)
    reader.close()


def logical(reader: Reader, case: tiny.Case, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    weights = tiny.weights(case, dtype)
    return {name: weights[hf_name(name)] for name in reader.tensors}


@pytest.fixture(params=["whole", "in pieces"])
def pieces(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same reads with limits so small that every tensor comes in many pieces, and column reads row by row."""
    if request.param == "in pieces":
        for module, name, value in (
            (stored, "PIECE_BYTES", 1000),
            (stored, "DECODED_BYTES", 90000),
            (stored, "SMALL_ROW", 16),
            (table, "JOINED_BYTES", 4000),
        ):
            monkeypatch.setattr(module, name, value)


@pytest.mark.usefixtures("pieces")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("name", "shards"), [("llama-attention-bias", 1), ("qwen3", 3), ("llama-tied", 2)])
def test_safetensors(tmp_path: Path, name: str, shards: int, dtype: torch.dtype) -> None:
    case = tiny.CASES[name]
    reader = open_checkpoint(tiny.save_hf(case, tmp_path, dtype, shards))
    assert reader.format == "safetensors"
    assert_same(reader, logical(reader, case, dtype))


@pytest.mark.parametrize("name", tiny.CASES)
def test_every_family_in_every_format(tmp_path: Path, name: str) -> None:
    case = tiny.CASES[name]
    readers = [open_checkpoint(tiny.save_hf(case, tmp_path / f"hf{n}", shards=n, style=3 + n)) for n in (1, 2)]
    if case.gguf:
        readers.append(open_checkpoint(tiny.save_gguf(case, tmp_path / "model.gguf")))
    readers += [open_checkpoint(tiny.save_meta(case, tmp_path / f"meta{n}", n)) for n in case.meta]
    configs = [reader.config for reader in readers]
    for reader in readers:
        want = logical(reader, case)
        assert all(torch.equal(gather(reader, key), value) for key, value in want.items())
        for key in ("dim", "n_heads", "n_kv_heads", "head_dim", "hidden_dim", "vocab_size", "rope_theta", "norm_eps"):
            assert getattr(reader.config, key) == getattr(configs[0], key), (reader.format, key)
        assert reader.config.rope_scaling == configs[0].rope_scaling
        reader.close()


@pytest.mark.usefixtures("pieces")
@pytest.mark.parametrize("llama2", [False, True])
@pytest.mark.parametrize("mp_size", [1, 2, 4])
def test_meta(tmp_path: Path, mp_size: int, llama2: bool) -> None:
    reader = open_checkpoint(tiny.save_meta(HALVES, tmp_path, mp_size, llama2, torch.bfloat16))
    assert reader.format == "meta" and reader.storage == {"BF16": len(reader.tensors)}
    assert_same(reader, logical(reader, HALVES, torch.bfloat16))


def save_parts(case: tiny.Case, folder: Path, n: int, repeat: int = 1, **params: Any) -> Path:
    """Meta files for numbers `save_meta` has no case for: KV heads in `repeat` neighbouring files, uneven cuts."""
    folder.mkdir()
    for rank in range(n):
        part = {}
        for name, (value, cut) in tiny.meta_state(case).items():
            if ".wk." in name or ".wv." in name:
                part[name] = value.tensor_split(n // repeat)[rank // repeat].clone()
            else:
                part[name] = value if cut is None else value.tensor_split(n, cut)[rank].clone()
        torch.save(part, folder / f"consolidated.{rank:02d}.pth")
    (folder / "params.json").write_text(json.dumps(tiny.params_json(case) | params))
    return folder


@pytest.mark.usefixtures("pieces")
def test_meta_in_three_files(tmp_path: Path) -> None:
    reader = open_checkpoint(save_parts(tiny.CASES["llama-9-3"], tmp_path / "m", 3))
    assert_same(reader, logical(reader, tiny.CASES["llama-9-3"]))


@pytest.mark.parametrize("repeat", [2, 4])
def test_meta_with_more_files_than_kv_heads(tmp_path: Path, repeat: int) -> None:
    case = tiny.CASES["llama-meta-repeat"]  # 2 KV heads
    reader = open_checkpoint(save_parts(case, tmp_path / "m", 2 * repeat, repeat))
    assert reader.tensors["layers.0.attention.wk.weight"].file_bytes == 16 * 64 * 4
    assert_same(reader, logical(reader, case))


@pytest.mark.parametrize("llama2", [False, True])
def test_meta_vocabulary_from_the_embedding(tmp_path: Path, llama2: bool) -> None:
    tiny.save_meta(HALVES, tmp_path, 2, llama2)
    (tmp_path / "params.json").write_text(json.dumps(tiny.params_json(HALVES) | {"vocab_size": -1}))
    assert open_checkpoint(tmp_path).config.vocab_size == tiny.META_VOCAB


def test_meta_from_a_module_state_dict(tmp_path: Path) -> None:
    """An OrderedDict with `_metadata`, parameters, and views into one storage, as other tools save them."""
    tiny.save_meta(HALVES, tmp_path)
    state = {key: value for key, (value, _) in tiny.meta_state(HALVES).items()}
    flat = torch.cat([value.flatten() for value in state.values()])
    views = flat.split([value.numel() for value in state.values()])
    named = {k: view.view(v.shape) for (k, v), view in zip(state.items(), views, strict=True)}
    named["norm.weight"] = torch.nn.Parameter(named["norm.weight"])
    holder = torch.nn.Module()
    ordered = holder.state_dict()
    ordered.update(named)
    torch.save(ordered, tmp_path / "consolidated.00.pth")
    reader = open_checkpoint(tmp_path)
    assert_same(reader, logical(reader, HALVES))


QUANTS = ["F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"]


def save_quants(path: Path, kind: str) -> dict[str, torch.Tensor]:
    """A one-layer GGUF of dim 512 with random blocks of one type; gives what the package's own reader decodes."""
    draw = np.random.default_rng(3)
    quant = gguf.GGMLQuantizationType[kind]
    shapes = {"token_embd": (19, 512), "output_norm": (512,), "output": (19, 512)}
    layer = {"attn_q": (512, 512), "attn_k": (128, 512), "attn_v": (128, 512), "attn_output": (512, 512)}
    layer |= {"ffn_gate": (256, 512), "ffn_up": (256, 512), "ffn_down": (512, 256)}
    shapes |= {f"blk.0.{name}": shape for name, shape in (layer | {"attn_norm": (512,), "ffn_norm": (512,)}).items()}
    out = gguf.GGUFWriter(path, "llama")
    for add, value in (
        (out.add_block_count, 1),
        (out.add_context_length, 64),
        (out.add_embedding_length, 512),
        (out.add_feed_forward_length, 256),
        (out.add_head_count, 8),
        (out.add_head_count_kv, 2),
        (out.add_layer_norm_rms_eps, 1e-5),
    ):
        add(value)
    for name, shape in shapes.items():
        if len(shape) == 1:
            out.add_tensor(f"{name}.weight", draw.standard_normal(shape, np.float32))
        elif kind in ("F16", "BF16", "Q8_0"):
            out.add_tensor(
                f"{name}.weight", gguf.quantize(draw.standard_normal(shape, np.float32), quant), raw_dtype=quant
            )
        else:
            # The package encodes few of these; bytes below 0x7c keep every half-precision scale finite.
            block, size = gguf.GGML_QUANT_SIZES[quant]
            raw = draw.integers(0, 0x78, (shape[0], shape[1] // block * size), np.uint8)
            out.add_tensor(f"{name}.weight", raw, raw_dtype=quant)
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()
    plain = {"F16": torch.float16, "BF16": torch.bfloat16}
    decoded = {}
    for tensor in gguf.GGUFReader(path).tensors:
        value = torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).copy())
        if tensor.name.endswith(("attn_q.weight", "attn_k.weight")):
            # llama.cpp's converter: (heads, 2, half) rows become (heads, half, 2)
            value = value.view(-1, 32, 2, 512).transpose(1, 2).reshape(value.shape)
        decoded[tensor.name] = value if value.ndim == 1 else value.to(plain.get(kind, torch.float32))
    return decoded


@pytest.mark.usefixtures("pieces")
@pytest.mark.parametrize("kind", QUANTS)
def test_gguf_types(tmp_path: Path, kind: str) -> None:
    want = save_quants(tmp_path / "m.gguf", kind)
    assert all(value.isfinite().all() for value in want.values())
    reader = open_checkpoint(tmp_path)
    assert reader.storage[kind] == 9 and reader.format == "gguf"
    assert_same(reader, {name: want[gguf_name(name)] for name in reader.tensors})


def test_gguf_metadata_are_plain_values(tmp_path: Path) -> None:
    reader: Any = open_checkpoint(tiny.save_gguf(tiny.CASES["qwen2"], tmp_path / "m.gguf"))
    assert reader.metadata["general.architecture"] == "qwen2"
    fields = gguf.GGUFReader(tmp_path / "m.gguf").fields
    for key, value in reader.metadata.items():
        assert value == fields[key].contents(), key
        assert type(value) in (int, float, bool, str, list)


def test_wide_rows_are_read_by_the_column(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of rows above 16 KiB only the bytes of the columns asked for are read."""
    file = tmp_path / "wide.safetensors"
    wide = torch.randn(40, 8192, generator=torch.Generator().manual_seed(1))
    safetensors.torch.save_file({"wide": wide}, file)
    tensor = read_header(File(file))["wide"]
    asked: list[int] = []
    plain = File.read_into
    monkeypatch.setattr(File, "read_into", lambda self, to, at: (asked.append(len(to)), plain(self, to, at))[1])
    for start, stop, size in ((1024, 2048, 4096), (8191, 8192, 4), (0, 5000, 32768)):
        asked.clear()
        got = torch.cat([piece.clone() for piece in stored.read_rectangle(tensor, 0, 40, start, stop)])
        assert torch.equal(got, wide[:, start:stop]) and sum(asked) == 40 * size


def test_bad_ranges_are_refused(tmp_path: Path) -> None:
    reader = open_checkpoint(tiny.save_hf(HALVES, tmp_path))
    for dim, start, stop in ((2, 0, 1), (-1, 0, 1), (0, 0, 10**6), (0, 5, 4), (1, -1, 3)):
        with pytest.raises(IndexError):
            next(reader.read("layers.0.attention.wq.weight", dim, start, stop))
    with pytest.raises(KeyError):
        next(reader.read("layers.9.attention.wq.weight"))


@pytest.mark.parametrize("differs", [False, True])
def test_a_stored_copy_of_a_tied_output(tmp_path: Path, differs: bool) -> None:
    """As transformers 5: left out when it is a copy, used when it is not, whatever the config says."""
    case = tiny.CASES["llama-tied"]
    tiny.save_hf(case, tmp_path)
    tensors = tiny.weights(case)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + (0.5 if differs else 0.0)
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    safetensors.torch.save_file(tensors, tmp_path / "model.safetensors")
    reader = open_checkpoint(tmp_path)
    assert reader.config.tied_embeddings is not differs
    assert ("output.weight" in reader.tensors) is differs
    if differs:
        assert torch.equal(gather(reader, "output.weight"), tensors["lm_head.weight"])


def test_what_lies_at_a_path(tmp_path: Path) -> None:
    hf = tiny.save_hf(HALVES, tmp_path / "hf")
    one = tiny.save_gguf(HALVES, tmp_path / "one" / "model.gguf")
    assert open_checkpoint(one).format == open_checkpoint(one.parent).format == "gguf"
    (tmp_path / "empty").mkdir()
    tiny.save_gguf(HALVES, one.parent / "second.gguf")
    tiny.save_meta(HALVES, tmp_path / "both")
    tiny.save_hf(HALVES, tmp_path / "both")
    tiny.save_meta(HALVES, tmp_path / "no params", 2)
    (tmp_path / "no params" / "params.json").unlink()
    tiny.save_meta(HALVES, tmp_path / "gap", 4)
    (tmp_path / "gap" / "consolidated.02.pth").unlink()
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "pytorch_model.bin").write_bytes(b"")
    for path, named in (
        ("nowhere", "no such file"),
        ("empty", "holds nothing"),
        ("one", "model.gguf, second.gguf"),
        ("both", "several checkpoints"),
        ("no params", "params.json"),
        ("gap", "consolidated.02.pth"),
        ("bin", "safetensors"),
        ("hf/config.json", "not a GGUF"),
    ):
        with pytest.raises(CheckpointError, match=named) as caught:
            open_checkpoint(tmp_path / path)
        assert "\n" not in str(caught.value)
    assert open_checkpoint(hf).format == "safetensors"


MEASURE = """
import sys
import torch
from llama_dist.checkpoint.open import open_checkpoint
torch.set_num_threads(1)
def peak():  # not getrusage, which starts from the peak of the process that called us
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) // 1024
before = peak()
reader = open_checkpoint(sys.argv[1])
for name, info in reader.tensors.items():
    for dim in range(len(info.shape)):
        for piece in reader.read(name, dim, 0, info.shape[dim] // 3 or 1):
            piece[0, :1] if piece.ndim > 1 else piece[:1]
    for piece in reader.read(name):
        pass
print(peak() - before)
"""


def test_memory_stays_near_a_piece(tmp_path: Path) -> None:
    """400 MB of tensors, one of 256 MB, read whole and in slices: the peak grows by far less than one of them."""
    config: dict[str, Any] = {"architectures": ["LlamaForCausalLM"], "num_attention_heads": 8, "num_key_value_heads": 8}
    config |= {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 1, "vocab_size": 65536}
    config |= {"tie_word_embeddings": True}
    (tmp_path / "config.json").write_text(json.dumps(config))
    header, at = {}, 0
    for name, shape in tensor_shapes(parse_hf_config(config)).items():
        size = 2 * int(np.prod(shape))
        header[hf_name(name)] = {"dtype": "BF16", "shape": shape, "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    with open(tmp_path / "model.safetensors", "wb") as out:
        out.write(struct.pack("<Q", len(text)) + text)
        out.truncate(8 + len(text) + at)  # holes: zeros that take no disk
    assert at > 380 * 2**20
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, tmp_path], capture_output=True, text=True, check=True, env=env
    )
    assert int(done.stdout) < 150, f"peak grew by {done.stdout} MB"
