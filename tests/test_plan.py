"""The planner: its bytes against arithmetic done another way and against what is allocated, and what it recommends."""

from __future__ import annotations

import dataclasses
import json
import math
import shlex

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llama_dist import __main__, cli
from llama_dist.checkpoint.open import open_checkpoint
from llama_dist.config import ModelConfig
from llama_dist.engine.engine import LOGIT_ROWS
from llama_dist.engine.plan import (
    OVERHEAD,
    Load,
    kv_bytes_per_token,
    largest,
    loading_peak,
    logits_bytes,
    model_bytes,
    rank_shapes,
    rank_terms,
    rank_weight_bytes,
    units_of,
    waste,
)
from llama_dist.frontend.options import parse_sizes
from llama_dist.frontend.plan import make_plan
from llama_dist.frontend.sizes import show_bytes
from llama_dist.model.cache import PAGE_SIZE
from llama_dist.model.transformer import Transformer
from llama_dist.parallel import layers
from llama_dist.parallel.layers import Part
from tests import tiny
from tests.conftest import Saver

# From the model cards: SmolLM2-135M has 134,515,008 parameters, Llama 3.1 8B 8,030,261,248 and 70B 70,553,706,496.
SMOLLM2 = ModelConfig("llama", 576, 30, 9, 3, 64, 1536, 49152, 1e-5, max_position=8192, tied_embeddings=True)
LLAMA_8B = ModelConfig("llama", 4096, 32, 32, 8, 128, 14336, 128256, 1e-5, max_position=131072)
LLAMA_70B = ModelConfig("llama", 8192, 80, 64, 8, 128, 28672, 128256, 1e-5, max_position=131072)
GB = 10**9


def load(batch: int, length: int) -> Load:
    return Load(batch, length, max(2048, batch), LOGIT_ROWS)


@st.composite
def configs(draw: st.DrawFn) -> ModelConfig:
    kv = draw(st.integers(1, 6))
    return ModelConfig(
        "llama",
        dim=draw(st.integers(1, 40)),
        n_layers=draw(st.integers(1, 3)),
        n_heads=kv * draw(st.integers(1, 5)),
        n_kv_heads=kv,
        head_dim=2 * draw(st.integers(1, 8)),
        hidden_dim=draw(st.integers(1, 100)),
        vocab_size=draw(st.integers(1, 300)),
        norm_eps=1e-5,
        tied_embeddings=draw(st.booleans()),
        attention_bias=draw(st.booleans()),
        attention_out_bias=draw(st.booleans()),
        mlp_bias=draw(st.booleans()),
        qk_norm=draw(st.booleans()),
        sliding_window=draw(st.none() | st.integers(1, 50)),
        sliding_layers=draw(st.sampled_from([(), (0,)])),
    )


@pytest.mark.parametrize(
    ("config", "parameters"), [(SMOLLM2, 134_515_008), (LLAMA_8B, 8_030_261_248), (LLAMA_70B, 70_553_706_496)]
)
def test_one_rank_holds_the_published_number_of_parameters(config: ModelConfig, parameters: int) -> None:
    assert rank_weight_bytes(config, units_of(config, 1, None), 1, 2) == [2 * parameters]
    assert model_bytes(config, 2) == 2 * parameters
    assert waste(config, units_of(config, 1, None), 1) == 0


def test_llama_70b_on_8_ranks_by_hand() -> None:
    units = units_of(LLAMA_70B, 8, None)
    # 8 query heads, 1 KV head, 3584 hidden and 16032 words a rank; all norms whole.
    layer = 2 * 8192 * 8 * 128 + 2 * 8192 * 128 + 3 * 8192 * 3584 + 2 * 8192
    assert rank_weight_bytes(LLAMA_70B, units, 8, 2) == [2 * (80 * layer + 2 * 16032 * 8192 + 8192)] * 8
    assert kv_bytes_per_token(LLAMA_70B, units, 8, 2) == 2 * 80 * 128 * 2
    assert 0 < waste(LLAMA_70B, units, 8) < 1e-3  # norms only


def test_smollm2_on_2_ranks_by_hand() -> None:
    units = units_of(SMOLLM2, 2, None)
    # 9 units of one head: 5 a rank, one of them zeros; each rank reads 2 of the 3 KV heads.
    layer = 2 * 576 * 5 * 64 + 2 * 576 * 2 * 64 + 3 * 576 * 768 + 2 * 576
    assert rank_weight_bytes(SMOLLM2, units, 2, 4) == [4 * (30 * layer + 24576 * 576 + 576)] * 2
    first, last = rank_weight_bytes(SMOLLM2, units, 2, 2, panels=True)
    assert first == 2 * (30 * layer + 24576 * 576 + 576)
    assert last == first - 30 * 2 * 576 * 64, "in panels the zero unit of wo is left out"
    assert kv_bytes_per_token(SMOLLM2, units, 2, 4) == 2 * 30 * 2 * 64 * 4
    held = 2 * (30 * layer + 24576 * 576 + 576)
    assert waste(SMOLLM2, units, 2) == pytest.approx(1 - 134_515_008 / held)
    largest_slice = 4 * 24576 * 576
    assert loading_peak(SMOLLM2, units, 2, 4) == 4 * held // 2 + largest_slice + 300_000_000
    row = 2 * 49152 * 4 + 2 * 49152 * 4  # parts and joined in float32, a float32 copy and its exponentials
    assert logits_bytes(SMOLLM2, units, 2, 4, load(8, 4096)) == LOGIT_ROWS * row + 80 * 49152


@pytest.mark.parametrize("name", sorted(tiny.CASES))
@pytest.mark.parametrize("n_ranks", [1, 2, 3, 4, 5, 7])
def test_bytes_are_those_a_rank_allocates(
    name: str, n_ranks: int, checkpoint: Saver, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = open_checkpoint(checkpoint(name, "hf")).config
    units = units_of(config, n_ranks, None)
    monkeypatch.setattr(layers.fs, "get_model_parallel_world_size", lambda: n_ranks)
    expected = rank_weight_bytes(config, units, n_ranks, 2)
    for rank in range(n_ranks):
        model = Transformer(config, units, Part(rank, n_ranks, torch.bfloat16, torch.device("meta")))
        held = {key: tuple(p.shape) for key, p in model.named_parameters()}
        assert held == rank_shapes(config, units, rank, n_ranks)
        assert sum(p.nbytes for p in model.parameters()) == expected[rank]
        cache = model.new_cache(5)
        assert cache.n_bytes == 5 * PAGE_SIZE * kv_bytes_per_token(config, units, n_ranks, 2)


@given(configs(), st.integers(1, 9), st.integers(0, 8))
def test_ranks_hold_alike_many_bytes_and_never_less_than_the_model(
    config: ModelConfig, n_ranks: int, more_units: int
) -> None:
    units = units_of(config, n_ranks, n_ranks + more_units)
    held = rank_weight_bytes(config, units, n_ranks, 1)
    assert len(set(held)) == 1 and len(held) == n_ranks
    assert sum(held) >= model_bytes(config, 1)
    assert 0 <= waste(config, units, n_ranks) < 1


@given(configs(), st.integers(1, 5), st.integers(1, 40), st.integers(1, 3000))
def test_more_work_never_takes_less(config: ModelConfig, n_ranks: int, batch: int, length: int) -> None:
    units = units_of(config, n_ranks, None)
    here = rank_terms(config, units, n_ranks, 2, load(batch, length))
    assert here.total == sum(dataclasses.astuple(here))
    for more in (load(batch + 1, length), load(batch, length + 1)):
        there = rank_terms(config, units, n_ranks, 2, more)
        assert all(b >= a for a, b in zip(dataclasses.astuple(here), dataclasses.astuple(there), strict=True))


@given(st.integers(0, 300), st.integers(1, 200))
def test_largest_finds_the_edge(edge: int, most: int) -> None:
    assert largest(lambda n: n <= edge, most) == min(edge, most)


@settings(max_examples=60)
@given(configs(), st.integers(1, 5), st.integers(1, 40), st.integers(1, 3000), st.integers(0, 3 * 10**8))
def test_what_is_recommended_fits_and_one_more_does_not(
    config: ModelConfig, n_ranks: int, batch: int, length: int, spare: int
) -> None:
    memory, units = OVERHEAD + spare, units_of(config, n_ranks, None)
    plan = make_plan(config, n_ranks, memory, load(batch, length), 2, None)

    def fits(batch: int, length: int) -> bool:
        return rank_terms(config, units, n_ranks, 2, load(batch, length)).total <= memory

    longest = max(length, config.max_position)
    assert plan.fits == fits(batch, length)
    assert plan.largest_batch == 0 or fits(plan.largest_batch, length)
    assert plan.largest_batch == 1 << 20 or not fits(plan.largest_batch + 1, length)
    assert plan.largest_length == 0 or fits(batch, plan.largest_length)
    assert plan.largest_length == longest or not fits(batch, plan.largest_length + 1)
    assert plan.longest == longest or not fits(1, plan.longest + 1)
    assert (plan.best is None) == (not fits(1, 1))
    assert plan.best is None or fits(plan.best.batch, plan.best.length)


@pytest.mark.parametrize(
    ("text", "sizes"),
    [
        ("80GB", (80 * GB,)),
        ("80gb", (80 * GB,)),
        ("1.5 GiB", (3 * 2**29,)),
        ("16MiB,2KB", (2**24, 2000)),
        ("7B", (7,)),
        ("2TB", (2 * 10**12,)),
    ],
)
def test_sizes(text: str, sizes: tuple[int, ...]) -> None:
    assert parse_sizes(text) == sizes


@pytest.mark.parametrize(
    "text", ["80", "80G", "GB", "-1GB", "0GB", "80GB,", "1e3GB", "80GB 40GB", "9" * 400 + "GB", ""]
)
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(ValueError, match="must be"):
        parse_sizes(text)


@given(st.integers(0, 10**15))
def test_shown_bytes_are_close_and_short(n: int) -> None:
    shown = show_bytes(n)
    value, unit = shown.split()
    factor = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}[unit]
    assert math.isclose(float(value) * factor, n, rel_tol=0.0051)
    assert float(value) < 1000 or n >= 10**15 - 10**12
    assert len(value) <= 4


def plan(folder: str, line: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    rc = __main__.main(["plan", "--ckpt_dir", folder, *shlex.split(line)])
    return rc, *capsys.readouterr()


def test_plan_prints_commands_that_this_program_understands(
    checkpoint: Saver, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = str(checkpoint("smollm2", "hf"))
    line = "--gpus 1,2,8,16 --gpu_memory 1.01GB --max_batch_size 4 --max_seq_len 64 --dtype float32 --units 16"
    rc, out, err = plan(folder, line + " --json", capsys)
    assert (rc, err) == (0, "")
    plans = [json.loads(text) for text in out.splitlines()]
    assert [p["gpus"] for p in plans] == [1, 2, 8, 16]
    config = open_checkpoint(folder).config
    for p in plans:
        assert p["bytes"]["weights"] == rank_weight_bytes(config, units_of(config, p["gpus"], 16), p["gpus"], 4)[0]
        assert p["bytes"]["kv_cache"] % (4 * 64) == 0
        words = shlex.split(p["command"])
        start, end = words.index("torchrun"), words.index("generate")
        hosts = int(words[words.index("--nnodes") + 1]) if "--nnodes" in words else 1
        assert hosts * int(words[words.index("--nproc_per_node") + 1]) == p["gpus"]
        assert (start, words[end - 2 : end]) == (0, ["-m", "llama_dist"])
        run = cli.parse(words[end:]).options.run
        assert (run.ckpt_dir, run.max_batch_size, run.max_seq_len) == (folder, 4, 64)
        assert (run.dtype, run.units) == ("float32", 16)
    rc, text, _ = plan(folder, line, capsys)
    assert rc == 0
    assert all(p["command"] in text for p in plans)


@pytest.mark.parametrize(("quantization", "share"), [("int8", 33 / 64), ("int4", 18 / 64), ("fp8", 32 / 64)])
def test_plan_of_packed_weights(quantization: str, share: float) -> None:
    """Llama 3 70B: 80 layers of packed weights, a head of 8 or 6 bits and a table that stays as it was."""
    units = units_of(LLAMA_70B, 8, None)
    whole = rank_weight_bytes(LLAMA_70B, units, 8, 2)[0]
    found = rank_weight_bytes(LLAMA_70B, units, 8, 2, quantization)[0]
    table = 2 * 16032 * 8192
    head = table * {"int8": 33 / 64, "int4": 25 / 64, "fp8": 33 / 64}[quantization]
    assert found == pytest.approx(table + head + share * (whole - 2 * table), rel=0.005)


def test_plan_names_the_packing(checkpoint: Saver, capsys: pytest.CaptureFixture[str]) -> None:
    folder = str(checkpoint("llama-tied", "hf"))
    rc, out, _ = plan(folder, "--gpus 2 --gpu_memory 2GB --quantization int4", capsys)
    assert rc == 0 and "float32 with int4 weights" in out and "--quantization int4" in out
    rc, out, _ = plan(folder, "--gpus 2 --gpu_memory 2GB --quantization int4 --json", capsys)
    assert json.loads(out)["quantization"] == "int4"


def test_plan_offers_less_where_what_was_asked_does_not_fit(
    checkpoint: Saver, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = str(checkpoint("llama-gqa", "hf"))
    rc, out, err = plan(folder, "--gpus 2 --gpu_memory 1.01GB --max_batch_size 90000 --max_seq_len 64 --json", capsys)
    found = json.loads(out)
    assert (rc, err, found["fits"]) == (0, "", False)
    assert 0 < found["largest_batch"] < 90000
    assert f"--max_batch_size {found['largest_batch']} " in found["command"]


def test_plan_says_why_nothing_fits(checkpoint: Saver, capsys: pytest.CaptureFixture[str]) -> None:
    folder = str(checkpoint("llama-gqa", "hf"))
    rc, out, err = plan(folder, "--gpus 1,2 --gpu_memory 0.9GB", capsys)
    assert (rc, err.count("\n")) == (2, 1)
    assert "nothing fits: on 2 GPUs" in err and "overhead alone takes 1.00 GB" in err
    assert "torchrun" not in out
    rc, _, err = plan(folder, "--gpus 4 --gpu_memory 1GB --units 3", capsys)
    assert rc == 2 and "--units 3 is less than 4 GPUs" in err


def test_plan_finds_the_number_of_gpus_that_would_do() -> None:
    from llama_dist.frontend.plan import why_not

    small = make_plan(LLAMA_70B, 1, 80 * GB, load(8, 4096), 2, None)
    assert small.best is None
    text = why_not(LLAMA_70B, small, 2, None)
    assert "weights alone take 141 GB" in text
    n = int(text.rsplit("; ", 1)[1].split()[0])
    assert make_plan(LLAMA_70B, n, 80 * GB, load(1, 4096), 2, None).fits
    assert not make_plan(LLAMA_70B, n - 1, 80 * GB, load(1, 4096), 2, None).fits
