"""What configs of each format turn into, held against transformers, the gguf package and the model cards."""

from __future__ import annotations

import json
from typing import Any

import gguf
import pytest
import torch
import transformers

from llama_dist.config import ModelConfig, RopeScaling
from llama_dist.errors import CheckpointError
from llama_dist.model.families import FAMILIES, gguf_name, hf_name, tensor_shapes
from llama_dist.model.gguf_config import parse_gguf_config, with_rope_factors
from llama_dist.model.hf_config import parse_hf_config
from llama_dist.model.meta_params import meta_vocab_size, parse_meta_params
from tests import tiny

SHAPES = {
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 32,
    "intermediate_size": 150,
    "vocab_size": 293,
}


def hf(architecture: str = "LlamaForCausalLM", **options: Any) -> dict[str, Any]:
    return {"architectures": [architecture], **SHAPES, **options}


def theirs(config: dict[str, Any]) -> Any:
    """The same file as transformers reads it."""
    model_type = next(f.model_type for f in FAMILIES if [f.architecture] == config["architectures"])
    options = {key: value for key, value in json.loads(json.dumps(config)).items() if key != "model_type"}
    return transformers.AutoConfig.for_model(model_type, **options)


@pytest.mark.parametrize("name", tiny.CASES)
def test_names_and_shapes_are_those_of_transformers(name: str) -> None:
    raw = tiny.config_json(tiny.CASES[name])
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(theirs(raw))
    want = {key: tuple(value.shape) for key, value in model.named_parameters()}  # tied ones once
    assert {hf_name(key): shape for key, shape in tensor_shapes(parse_hf_config(raw)).items()} == want


@pytest.mark.parametrize("family", [f for f in FAMILIES if f.gguf], ids=lambda f: f.name)
def test_gguf_names_are_those_of_the_package(family: Any) -> None:
    arch = next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == family.gguf)
    names = gguf.TensorNameMap(arch, 2)
    config = ModelConfig(family.name, 64, 2, 8, 2, 8, 150, 293, 1e-5, qk_norm=family.qk_norm, attention_bias=True)
    for name in tensor_shapes(config):
        assert gguf_name(name) == names.get_name(hf_name(name), (".weight", ".bias")), name


@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.name)
def test_absent_keys_mean_what_they_mean_to_transformers(family: Any) -> None:
    raw = hf(family.architecture)
    ours, want = parse_hf_config(raw), theirs(raw)
    assert ours.n_kv_heads == want.num_key_value_heads
    assert ours.head_dim == (getattr(want, "head_dim", None) or want.hidden_size // want.num_attention_heads)
    assert ours.norm_eps == want.rms_norm_eps
    assert ours.max_position == want.max_position_embeddings
    assert ours.tied_embeddings == want.tie_word_embeddings
    assert ours.bos_id == want.bos_token_id
    assert ours.eos_ids == (() if want.eos_token_id is None else (want.eos_token_id,))
    assert ours.rope_theta == want.rope_parameters["rope_theta"] and ours.rope_scaling is None
    assert ours.attention_out_bias == getattr(want, "attention_bias", False)
    window = getattr(want, "sliding_window", None)
    assert ours.sliding_window == window and bool(ours.sliding_layers) == (window is not None)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
        {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 4},
        {"use_sliding_window": True, "sliding_window": 8},
        {"use_sliding_window": False, "sliding_window": 8, "max_window_layers": 1},
        {"use_sliding_window": True, "sliding_window": None, "max_window_layers": 1},
        {
            "use_sliding_window": True,
            "sliding_window": 8,
            "layer_types": ["full_attention", "sliding_attention", "full_attention", "sliding_attention"],
        },
    ],
)
@pytest.mark.parametrize("architecture", ["Qwen2ForCausalLM", "Qwen3ForCausalLM"])
def test_sliding_layers_are_those_of_transformers(architecture: str, options: dict[str, Any]) -> None:
    raw = hf(architecture, **options)
    ours, want = parse_hf_config(raw), theirs(raw)
    layers = tuple(i for i, kind in enumerate(want.layer_types) if kind == "sliding_attention")
    assert ours.sliding_layers == layers
    assert ours.sliding_window == (want.sliding_window if layers else None)


def test_mistral_slides_everywhere_or_nowhere() -> None:
    one = parse_hf_config(hf("MistralForCausalLM", sliding_window=7))
    assert (one.sliding_window, one.sliding_layers) == (7, (0, 1, 2, 3))
    none = parse_hf_config(hf("MistralForCausalLM", sliding_window=None))
    assert (none.sliding_window, none.sliding_layers) == (None, ())
    llama = parse_hf_config(hf(sliding_window=7))
    assert (llama.sliding_window, llama.sliding_layers) == (None, ())


LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


@pytest.mark.parametrize(
    ("options", "theta", "scaling"),
    [
        ({"rope_theta": 5e5}, 5e5, None),
        ({"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}}, 5e5, None),
        ({"rope_theta": 2.0, "rope_parameters": {"rope_theta": 5e5}}, 5e5, None),
        ({"rope_scaling": {"type": "linear", "factor": 4}}, 1e4, RopeScaling("linear", 4.0)),
        ({"rope_parameters": {"rope_type": "linear", "factor": 4.0}}, 1e4, RopeScaling("linear", 4.0)),
        (
            {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}, "max_position_embeddings": 512},
            1e4,
            RopeScaling("dynamic", 2.0, original_max_position=512),
        ),
        ({"rope_scaling": LLAMA3 | {"original_max_position_embeddings": 8192}}, 1e4, RopeScaling("llama3", 8.0)),
        (
            {"rope_scaling": LLAMA3, "max_position_embeddings": 640},
            1e4,
            RopeScaling("llama3", 8.0, original_max_position=640),
        ),
    ],
)
def test_rotary_parameters(options: dict[str, Any], theta: float, scaling: RopeScaling | None) -> None:
    ours, want = parse_hf_config(hf(**options)), theirs(hf(**options)).rope_parameters
    assert (ours.rope_theta, ours.rope_scaling) == (theta, scaling)
    assert want["rope_theta"] == theta and want["rope_type"] == ("default" if scaling is None else scaling.kind)
    if scaling is not None and scaling.kind == "llama3":
        assert want["original_max_position_embeddings"] == scaling.original_max_position


def test_stop_ids_of_both_files() -> None:
    ours = parse_hf_config(hf(eos_token_id=128001), {"eos_token_id": [128001, 128008, 128009]})
    assert ours.eos_ids == (128001, 128008, 128009)
    assert parse_hf_config(hf(eos_token_id=None)).eos_ids == ()


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"architectures": ["MixtralForCausalLM"]}, "MixtralForCausalLM"),
        ({"architectures": None, "model_type": "phi3"}, "phi3"),
        ({"architectures": ["LlamaForCausalLM", "X"]}, "LlamaForCausalLM, X"),
        ({"architectures": "LlamaForCausalLM"}, "architectures"),
        ({"quantization_config": {"quant_method": "gptq"}}, "gptq"),
        ({"num_local_experts": 8}, "num_local_experts"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "yarn"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 4.0}}, "low_freq_factor"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1.0}}}, "full_attention"),
        ({"hidden_act": "gelu"}, "gelu"),
        ({"hidden_size": "64"}, "hidden_size"),
        ({"hidden_size": True}, "hidden_size"),
        ({"hidden_size": None}, "hidden_size"),
        ({"hidden_size": 10**400}, "hidden_size"),
        ({"num_hidden_layers": 2**30}, "num_hidden_layers"),
        ({"rms_norm_eps": float("inf")}, "rms_norm_eps"),
        ({"rope_theta": 10**400}, "rope_theta"),
        ({"attention_bias": 1}, "attention_bias"),
        ({"eos_token_id": "2"}, "eos_token_id"),
    ],
)
def test_what_is_refused_is_named(options: dict[str, Any], named: str) -> None:
    with pytest.raises(CheckpointError, match=named) as caught:
        parse_hf_config(hf(**options))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 250


def test_layer_types_that_are_refused() -> None:
    for kinds, named in ((["full_attention"], "layer_types"), (["chunked_attention"] * 4, "chunked_attention")):
        with pytest.raises(CheckpointError, match=named):
            parse_hf_config(hf("Qwen3ForCausalLM", layer_types=kinds))
    with pytest.raises(CheckpointError, match="sliding_window is off"):
        parse_hf_config(hf("Qwen3ForCausalLM", layer_types=["sliding_attention"] * 4))


# dim, layers, heads, KV heads, multiple_of, multiplier, hidden (model cards and papers), theta, scaled, factor, length
RELEASES = {
    "llama-7b": (4096, 32, 32, None, 256, None, 11008, None, None, None, 4096),
    "llama-65b": (8192, 80, 64, None, 256, None, 22016, None, None, None, 4096),
    "llama-2-70b": (8192, 80, 64, 8, 4096, 1.3, 28672, None, None, None, 4096),
    "llama-3-8b": (4096, 32, 32, 8, 1024, 1.3, 14336, 500000.0, None, None, 8192),
    "llama-3.1-8b": (4096, 32, 32, 8, 1024, 1.3, 14336, 500000.0, True, 8.0, 131072),
    "llama-3.1-405b": (16384, 126, 128, 8, 4096, 1.2, 53248, 500000.0, True, 8.0, 131072),
    "llama-3.2-1b": (2048, 16, 32, 8, 256, 1.5, 8192, 500000.0, True, 32.0, 131072),
    "llama-3.2-3b": (3072, 28, 24, 8, 256, 1.0, 8192, 500000.0, True, 32.0, 131072),
}


@pytest.mark.parametrize("name", RELEASES)
def test_meta_releases(name: str) -> None:
    dim, layers, heads, kv, multiple, multiplier, hidden, theta, scaled, factor, length = RELEASES[name]
    params = {"dim": dim, "n_layers": layers, "n_heads": heads, "multiple_of": multiple, "norm_eps": 1e-05}
    optional = {"n_kv_heads": kv, "ffn_dim_multiplier": multiplier, "rope_theta": theta, "use_scaled_rope": scaled}
    ours = parse_meta_params(params | {key: value for key, value in optional.items() if value is not None}, 32000)
    assert (ours.dim, ours.n_layers, ours.n_heads, ours.n_kv_heads) == (dim, layers, heads, kv or heads)
    assert (ours.hidden_dim, ours.head_dim, ours.max_position) == (hidden, dim // heads, length)
    assert ours.rope_theta == (theta or 10000.0)
    assert ours.rope_scaling == (None if factor is None else RopeScaling("llama3", factor))
    assert not ours.tied_embeddings


def test_meta_fields_that_are_ignored_or_refused(caplog: pytest.LogCaptureFixture) -> None:
    params = {"dim": 64, "n_layers": 2, "n_heads": 8, "norm_eps": 1e-5}
    caplog.set_level("INFO", "llama_dist")
    parse_meta_params(params | {"n_kv_heads": None, "colour": "red", "lora_args": None}, 10)
    assert "colour" in caplog.text
    assert meta_vocab_size({"vocab_size": -1}) is None and meta_vocab_size({"vocab_size": 7}) == 7
    refused: list[dict[str, Any]] = [
        {"quantization_args": {"scheme": "int4"}},
        {"lora_args": {"rank": 16}},
        {"vision_chunk_size": 448},
        {"vision_model": {"patch": 14}},
        {"moe": {"num_experts": 8}},
        {"dim": 65},
        {"ffn_dim_multiplier": 1e9},
        {"n_layers": 10**9},
        {"norm_eps": "small"},
    ]
    for option in refused:
        with pytest.raises(CheckpointError, match=next(iter(option))):
            parse_meta_params(params | option, 10)


def gguf_metadata(**options: Any) -> dict[str, Any]:
    return {
        "general.architecture": "llama",
        "llama.block_count": 2,
        "llama.context_length": 256,
        "llama.embedding_length": 64,
        "llama.feed_forward_length": 150,
        "llama.attention.head_count": 8,
        "llama.attention.head_count_kv": 2,
        "llama.attention.layer_norm_rms_epsilon": 9.999999747378752e-06,
        "llama.rope.freq_base": 500000.0,
        "tokenizer.ggml.eos_token_id": 3,
        "tokenizer.ggml.eot_token_id": 2,
        **{key.replace("__", "."): value for key, value in options.items()},
    }


def test_gguf_metadata() -> None:
    ours = parse_gguf_config(gguf_metadata(), ["output.weight", "blk.0.attn_q.bias"], 293)
    assert (ours.norm_eps, ours.eos_ids, ours.bos_id, ours.head_dim) == (1e-5, (2, 3), None, 8)
    assert ours.attention_bias and not ours.attention_out_bias and not ours.tied_embeddings
    assert parse_gguf_config(gguf_metadata(), [], 293).tied_embeddings
    for option, named in (
        ({"general__architecture": "mamba"}, "mamba"),
        ({"llama__expert_count": 8}, "expert_count"),
        ({"split__count": 3}, "llama-gguf-split"),
        ({"llama__rope__scaling__type": "yarn"}, "yarn"),
        ({"llama__rope__dimension_count": 4}, "dimension_count"),
        ({"llama__attention__head_count": [8, 8]}, "head_count"),
    ):
        with pytest.raises(CheckpointError, match=named):
            parse_gguf_config(gguf_metadata(**option), [], 293)


@pytest.mark.parametrize(("factor", "theta"), [(8.0, 500000.0), (32.0, 500000.0), (8.0, 20000.0)])
def test_rope_factors_of_gguf_become_the_scaling(factor: float, theta: float) -> None:
    options = {"num_attention_heads": 1, "rope_theta": theta, "max_position_embeddings": 131072}
    scaling = LLAMA3 | {"factor": factor, "original_max_position_embeddings": 8192}
    plain = parse_hf_config(hf(**options))
    scaled = theirs(hf(**options, rope_scaling=scaling))
    inverse, _ = transformers.modeling_rope_utils.ROPE_INIT_FUNCTIONS["llama3"](scaled, torch.device("cpu"))
    base = 1.0 / theta ** (torch.arange(0, 64, 2) / 64)
    factors = (base / inverse).tolist()
    assert with_rope_factors(plain, factors).rope_scaling == RopeScaling("llama3", factor)
    assert with_rope_factors(plain, [1.0] * 32).rope_scaling is None
    for wrong in (factors[:-1], [2.0] * 32, [*factors[:20], 3.3, *factors[21:]], [float("nan")] * 32):
        with pytest.raises(CheckpointError, match="rope_freqs"):
            with_rope_factors(plain, wrong)
