"""Converted checkpoints mean the same, bit for bit, to our readers, to transformers and to Meta's code."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import safetensors
import safetensors.torch
import torch

from llama_dist.checkpoint import meta_writer
from llama_dist.checkpoint.convert import Format, check_convert, convert
from llama_dist.checkpoint.open import open_checkpoint
from llama_dist.checkpoint.reader import Reader
from llama_dist.checkpoint.torch_zip import TorchZip
from llama_dist.config import ModelConfig, RopeScaling
from llama_dist.errors import CheckpointError, ConfigError
from llama_dist.model.families import hf_name
from llama_dist.model.meta_params import feed_forward_dim, parse_meta_params
from tests import reference, tiny
from tests.conftest import Saver

PROMPT = [5 + (37 * i) % 280 for i in range(30)]
META_CASES = ["llama-mha", "llama-9-3", "llama-meta", "llama-meta-scaled"]


def run(source: Path, out: Path, fmt: Format, mp_size: int = 1, **options: object) -> Path:
    reader = open_checkpoint(source)
    try:
        convert(reader, out, fmt, mp_size, **options)  # type: ignore[arg-type]
    finally:
        reader.close()
    return out


def logical(path: Path) -> dict[str, torch.Tensor]:
    reader = open_checkpoint(path)
    try:
        return {name: torch.cat([piece.clone() for piece in reader.read(name)]) for name in reader.tensors}
    finally:
        reader.close()


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert left.keys() == right.keys()
    for name, value in left.items():
        assert value.dtype == right[name].dtype, name
        assert torch.equal(value, right[name]), name


def hf_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """What the safetensors library finds, not our reader."""
    out: dict[str, torch.Tensor] = {}
    for path in folder.glob("*.safetensors"):
        out |= safetensors.torch.load_file(path)
    return out


def pth_tensors(folder: Path, mmap: bool = False) -> list[dict[str, torch.Tensor]]:
    """What torch.load finds in each file."""
    return [torch.load(path, weights_only=True, mmap=mmap) for path in sorted(folder.glob("*.pth"))]


@pytest.mark.parametrize("name", tiny.CASES)
def test_hf_to_hf_is_exact_and_transformers_agrees(checkpoint: Saver, tmp_path: Path, name: str) -> None:
    out = run(checkpoint(name, "hf5"), tmp_path / "out", "hf", max_shard_bytes=60_000)
    same(hf_tensors(out), tiny.weights(tiny.CASES[name]))
    torch.testing.assert_close(reference.hf_logits(out, PROMPT), reference.hf_logits(name, PROMPT), rtol=0, atol=1e-5)
    source, again = open_checkpoint(checkpoint(name, "hf5")), open_checkpoint(out)
    assert source.config == again.config


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", META_CASES)
def test_hf_to_meta_to_hf(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    case = tiny.CASES[name]
    for mp_size in case.meta:
        source = tiny.save_hf(case, tmp_path / f"hf{mp_size}", dtype)
        meta = run(source, tmp_path / f"meta{mp_size}", "meta", mp_size)
        back = run(meta, tmp_path / f"back{mp_size}", "hf")
        same(hf_tensors(back), tiny.weights(case, dtype))


@pytest.mark.parametrize("mp_size", [1, 2, 4])
def test_meta_to_hf_to_meta(checkpoint: Saver, tmp_path: Path, mp_size: int) -> None:
    source = checkpoint("llama-meta", f"meta{mp_size}")
    hf = run(source, tmp_path / "hf", "hf")
    back = run(hf, tmp_path / "back", "meta", mp_size)
    for one, other in zip(pth_tensors(source), pth_tensors(back), strict=True):
        same(other, one)


def test_llama2_embedding_comes_back_cut_by_rows(checkpoint: Saver, tmp_path: Path) -> None:
    out = run(checkpoint("llama-meta", "meta2-llama2"), tmp_path / "out", "meta", 2)
    expected = pth_tensors(checkpoint("llama-meta", "meta2"))
    for one, other in zip(expected, pth_tensors(out), strict=True):
        same(other, one)


@pytest.mark.parametrize("mp_size", [1, 2, 4, 8])
def test_metas_files_are_what_torch_would_save(checkpoint: Saver, tmp_path: Path, mp_size: int) -> None:
    """Read by torch, with and without mmap, each tensor aligned; more files than KV heads repeat heads."""
    case = tiny.CASES["llama-meta-repeat"]  # 8 heads, 2 KV heads, 152 hidden, 544 words
    out = run(checkpoint(case.name, "hf"), tmp_path / "out", "meta", mp_size)
    whole = tiny.meta_state(case)
    copies = max(1, mp_size // 2)
    for rank, part in enumerate(pth_tensors(out)):
        expected = {}
        for name, (value, cut) in whole.items():
            if ".wk." in name or ".wv." in name:
                value = value.unflatten(0, (2, -1)).repeat_interleave(copies, 0).flatten(0, 1)
            expected[name] = value if cut is None else value.chunk(mp_size, cut)[rank]
        same(part, expected)
        assert all(value.is_contiguous() for value in part.values())
    for one, other in zip(pth_tensors(out), pth_tensors(out, mmap=True), strict=True):
        same(one, other)
    params = json.loads((out / "params.json").read_text())
    assert params["n_kv_heads"] == max(2, mp_size)
    assert parse_meta_params(params, 544).hidden_dim == 152


def test_heads_held_twice_give_the_same_logits(checkpoint: Saver, tmp_path: Path) -> None:
    wide = run(checkpoint("llama-meta-repeat", "hf"), tmp_path / "wide", "meta", 8)
    back = run(wide, tmp_path / "back", "hf")
    assert open_checkpoint(back).config.n_kv_heads == 8
    expected = reference.hf_logits("llama-meta-repeat", PROMPT)
    torch.testing.assert_close(reference.hf_logits(back, PROMPT), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["llama-tied", "llama-meta-scaled"])
def test_metas_code_reads_it(checkpoint: Saver, tmp_path: Path, name: str) -> None:
    out = run(checkpoint(name, "hf"), tmp_path / "out", "meta")
    (logits,) = reference.meta_logits(out, [PROMPT])
    torch.testing.assert_close(logits, reference.hf_logits(name, PROMPT), rtol=0, atol=1e-3)


def test_tied_embeddings_are_written_twice(checkpoint: Saver, tmp_path: Path) -> None:
    (state,) = pth_tensors(run(checkpoint("smollm2", "hf"), tmp_path / "out", "meta"))
    assert torch.equal(state["output.weight"], state["tok_embeddings.weight"])


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16"])
@pytest.mark.parametrize("name", ["llama-gqa", "llama-attention-bias", "llama-rope-linear", "qwen2-tied", "qwen3"])
def test_gguf_to_hf(checkpoint: Saver, tmp_path: Path, name: str, kind: str) -> None:
    out = run(checkpoint(name, f"gguf-{kind}"), tmp_path / "out", "hf")
    dtype = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[kind]
    expected = {
        key: value if value.ndim == 1 else value.to(dtype) for key, value in tiny.weights(tiny.CASES[name]).items()
    }
    same(hf_tensors(out), expected)
    if kind == "F32":
        expected_logits = reference.hf_logits(name, PROMPT)
        torch.testing.assert_close(reference.hf_logits(out, PROMPT), expected_logits, rtol=0, atol=1e-4)


def test_quantised_becomes_float32_or_what_is_asked(checkpoint: Saver, tmp_path: Path) -> None:
    source = checkpoint("llama-gqa", "gguf-Q8_0")
    decoded = {hf_name(name): value for name, value in logical(source).items()}
    same(hf_tensors(run(source, tmp_path / "same", "hf")), decoded)
    halves = hf_tensors(run(source, tmp_path / "half", "hf", dtype=torch.bfloat16))
    same(halves, {name: value.to(torch.bfloat16) for name, value in decoded.items()})
    assert json.loads((tmp_path / "half" / "config.json").read_text())["torch_dtype"] == "bfloat16"


def test_shards_and_index(checkpoint: Saver, tmp_path: Path) -> None:
    out = run(checkpoint("llama-gqa", "hf"), tmp_path / "out", "hf", max_shard_bytes=100_000)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in out.glob("*.safetensors"))
    assert files == sorted(set(index["weight_map"].values()))
    assert len(files) > 2
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in tiny.weights(tiny.CASES["llama-gqa"]).values())
    for file in files:
        with safetensors.safe_open(out / file, "pt") as opened:
            assert set(opened.keys()) == {name for name, where in index["weight_map"].items() if where == file}
            assert sum(opened.get_tensor(name).nbytes for name in opened.keys()) <= 100_000  # noqa: SIM118
    assert sorted(p.name for p in out.iterdir()) == [
        "config.json",
        "generation_config.json",
        *files,
        "model.safetensors.index.json",
    ]


def test_tokenizer_files_come_along(checkpoint: Saver, tmp_path: Path) -> None:
    source = checkpoint("smollm2", "hf")
    names = ("tokenizer.json", "tokenizer_config.json")
    out = run(source, tmp_path / "out", "meta", tokenizer_files=[source / name for name in names])
    assert all((out / name).read_bytes() == (source / name).read_bytes() for name in names)
    with pytest.raises(ConfigError, match=r"config\.json cannot be copied"):
        run(source, tmp_path / "clash", "hf", tokenizer_files=[source / "config.json"])
    assert os.listdir(tmp_path) == ["out"]


def test_output_is_the_same_bytes_every_time(checkpoint: Saver, tmp_path: Path) -> None:
    for fmt in ("meta", "hf"):
        one, other = (run(checkpoint("llama-meta", "hf"), tmp_path / f"{fmt}{n}", fmt) for n in (1, 2))
        for path in one.iterdir():
            assert path.read_bytes() == (other / path.name).read_bytes()


@pytest.mark.parametrize(
    ("name", "mp_size", "message"),
    [
        ("llama-gqa", 2, "can be cut into 1 files"),
        ("llama-meta", 3, "can be cut into 1, 2, 4, 8 files"),
        ("llama-meta", 0, "is 0"),
        ("llama-attention-bias", 1, "attention_bias True"),
        ("llama-mlp-bias", 1, "mlp_bias True"),
        ("qwen2", 1, "attention_bias True"),
        ("qwen3", 1, "head_dim 16"),
        ("llama-head-dim", 1, "head_dim 20"),
        ("mistral-window", 1, "sliding_window 8"),
        ("llama-rope-linear", 1, "rope_scaling"),
        ("llama-rope-dynamic", 1, "rope_scaling"),
        ("llama-rope-llama3", 1, "rope_scaling"),
    ],
)
def test_what_metas_format_cannot_hold(
    checkpoint: Saver, tmp_path: Path, name: str, mp_size: int, message: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        run(checkpoint(name, "hf"), tmp_path / "out", "meta", mp_size)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not any(tmp_path.iterdir())


def test_qk_norm_is_refused() -> None:
    config = ModelConfig("qwen3", 64, 2, 8, 2, 8, 152, 544, 1e-5, qk_norm=True)
    with pytest.raises(ConfigError, match="qk_norm True"):
        check_convert(config, Path("nowhere"), "meta")


def test_what_a_family_cannot_say() -> None:
    config = ModelConfig("llama", 64, 2, 8, 2, 8, 152, 544, 1e-5, attention_bias=True, attention_out_bias=False)
    with pytest.raises(ConfigError, match="LlamaForCausalLM cannot express"):
        check_convert(config, Path("nowhere"), "hf")


@pytest.mark.parametrize(("dim", "layers", "factor"), [(2048, 16, 32.0), (3072, 28, 32.0), (4096, 32, 8.0)])
def test_scaled_rope_of_metas_releases(dim: int, layers: int, factor: float) -> None:
    """params.json says only `use_scaled_rope`: the factor must be the one a reader infers from the sizes."""
    config = ModelConfig(
        "llama", dim, layers, 32, 8, dim // 32, 4 * dim, 128256, 1e-5, 5e5, RopeScaling("llama3", factor)
    )
    params = meta_writer.params_for(config, 1)
    assert params["use_scaled_rope"] is True
    wrong = dataclasses.replace(config, rope_scaling=RopeScaling("llama3", 40.0 - factor))
    with pytest.raises(ConfigError, match="rope_scaling"):
        meta_writer.params_for(wrong, 1)


def test_feed_forward_rule_is_met_for_all_sizes() -> None:
    known = {(4096, 11008), (5120, 13824), (8192, 28672), (4096, 14336), (16384, 53248), (2048, 8192), (3072, 8192)}
    odd = {(dim, hidden) for dim in (2, 64, 72, 576, 5120) for hidden in range(1, 400)}
    for dim, hidden in sorted(known | odd):
        multiple, factor = meta_writer.multiples_for(dim, hidden)
        assert feed_forward_dim(dim, multiple, factor) == hidden, (dim, hidden, multiple, factor)


def test_a_used_target_is_refused(checkpoint: Saver, tmp_path: Path) -> None:
    source, full, file = checkpoint("llama-gqa", "hf"), tmp_path / "full", tmp_path / "file"
    full.mkdir()
    (full / "mine").touch()
    file.touch()
    for target, message in ((full, "is not empty"), (file, "is not a directory")):
        with pytest.raises(ConfigError, match=message):
            run(source, target, "hf")
    assert os.listdir(full) == ["mine"]
    (tmp_path / "empty").mkdir()
    run(source, tmp_path / "empty", "hf")
    assert (tmp_path / "empty" / "config.json").exists()


CHILD = """
import resource, signal, sys
from pathlib import Path
import torch
from llama_dist.checkpoint.convert import convert
from llama_dist.checkpoint.reader import TensorInfo
from llama_dist.config import ModelConfig
from llama_dist.model.families import tensor_shapes

torch.set_num_threads(1)

class Made:
    '''650 MB of numbers that lie nowhere: pieces of 32 MiB in one buffer, as the real readers give them.'''
    config = ModelConfig("llama", 1024, 2, 8, 8, 128, 4096, 65536, 1e-5)
    tensors = {name: TensorInfo(shape, torch.float32, 0) for name, shape in tensor_shapes(config).items()}

    def read(self, name):
        shape = self.tensors[name].shape
        if len(shape) == 1:
            yield torch.ones(shape)
            return
        buffer = torch.empty(min(shape[0], 2**23 // shape[1]), shape[1])
        for start in range(0, shape[0], len(buffer)):
            buffer.fill_(start)
            yield buffer[: shape[0] - start]
            if sys.argv[3] == "die" and name == "layers.1.attention.wo.weight":
                signal.raise_signal(signal.SIGKILL)

before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
convert(Made(), Path(sys.argv[1]), sys.argv[2], 2 if sys.argv[2] == "meta" else 1, torch.bfloat16)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def child(out: Path, fmt: str, fate: str) -> subprocess.CompletedProcess[str]:
    root = Path(__file__).resolve().parent.parent
    command = [sys.executable, "-c", CHILD, str(out), fmt, fate]
    return subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("fmt", ["meta", "hf"])
def test_memory_stays_near_a_piece(tmp_path: Path, fmt: Format) -> None:
    """The largest tensor alone has 268 MB, all of them 650 MB."""
    done = child(tmp_path / "out", fmt, "live")
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) / 1024 < 200
    shutil.rmtree(tmp_path / "out")


def test_a_killed_convert_leaves_no_checkpoint(tmp_path: Path) -> None:
    assert child(tmp_path / "out", "meta", "die").returncode == -signal.SIGKILL
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".out.partial-")
    with pytest.raises(CheckpointError):
        open_checkpoint(tmp_path / "out")
    with pytest.raises(CheckpointError):
        open_checkpoint(left)


class Broken:
    """A reader that fails, or tires of it, at one tensor."""

    def __init__(self, inner: Reader, error: BaseException) -> None:
        self.inner, self.error = inner, error
        self.config, self.tensors = inner.config, inner.tensors

    def read(self, name: str, *rest: int) -> object:
        if name == "layers.1.attention.wo.weight":
            raise self.error
        return self.inner.read(name, *rest)


@pytest.mark.parametrize("fmt", ["meta", "hf"])
@pytest.mark.parametrize(
    "error", [CheckpointError("broken"), KeyboardInterrupt(), OSError(28, "No space left on device")]
)
def test_a_failed_convert_leaves_nothing(checkpoint: Saver, tmp_path: Path, fmt: Format, error: BaseException) -> None:
    reader = Broken(open_checkpoint(checkpoint("llama-gqa", "hf")), error)
    expected = CheckpointError if isinstance(error, OSError) else type(error)
    with pytest.raises(expected) as caught:
        convert(reader, tmp_path / "out", fmt)  # type: ignore[arg-type]
    assert not any(tmp_path.iterdir())
    if isinstance(error, OSError):
        assert "No space left" in str(caught.value)


def test_a_full_disk_is_seen_first(checkpoint: Saver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(CheckpointError, match="GB free"):
        run(checkpoint("llama-gqa", "hf"), tmp_path / "out", "hf")
    assert not any(tmp_path.iterdir())


def test_float16_that_overflows_is_refused(tmp_path: Path) -> None:
    folder = tiny.save_hf(tiny.CASES["llama-gqa"], tmp_path / "in")
    tensors = hf_tensors(folder)
    tensors["model.layers.0.mlp.up_proj.weight"][3, 4] = 70000.0
    safetensors.torch.save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"layers\.0\.feed_forward\.w3\.weight has values that float16"):
        run(folder, tmp_path / "out", "hf", dtype=torch.float16)
    assert os.listdir(tmp_path) == ["in"]


@pytest.mark.parametrize("large", [False, True])
def test_zip_members_are_aligned_stored_and_sound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, large: bool) -> None:
    """`large`: sizes and offsets written in 64 bits throughout, as for files above 2 GiB."""
    if large:
        monkeypatch.setattr(zipfile, "ZIP64_LIMIT", 1)
    path = tmp_path / "x.pth"
    shapes = {"a": ((3,), torch.bfloat16), "b.weight": ((5, 7), torch.float32), "c": ((1, 1), torch.float16)}
    values = {name: torch.randn(shape).to(dtype) for name, (shape, dtype) in shapes.items()}
    with TorchZip(path, shapes) as file:
        for name, value in values.items():
            with file.tensor(name) as out:
                out.write(value.view(torch.uint8).numpy().tobytes())
    same(torch.load(path, weights_only=True), values)
    data = path.read_bytes()
    assert (b"PK\x06\x06" in data) == large
    with zipfile.ZipFile(path) as archive:
        assert archive.testzip() is None
        for info in archive.infolist():
            sizes = data[info.header_offset + 26 : info.header_offset + 30]
            begin = info.header_offset + 30 + sum(int.from_bytes(sizes[i : i + 2], "little") for i in (0, 2))
            assert begin % 64 == 0, info.filename
            assert info.compress_type == zipfile.ZIP_STORED
