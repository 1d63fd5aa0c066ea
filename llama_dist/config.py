"""What a model is and how a run is set up: frozen dataclasses, the one home of every default."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from llama_dist.errors import ConfigError
from llama_dist.quant.scheme import QUANTIZATIONS

DTYPES = ("auto", "float32", "bfloat16", "float16")
DEVICES = ("auto", "cpu", "cuda")


@dataclass(frozen=True)
class RopeScaling:
    """How rotary frequencies are stretched beyond the length a model was trained on.

    `llama3`: Llama 3.1's piecewise rule (model card of Llama 3.1; Hugging Face `rope_type: llama3`).
    `linear`: positions divided by `factor` (Chen et al. 2023).
    `dynamic`: the base grows with the length beyond `original_max_position` (NTK-aware, dynamic).
    """

    kind: Literal["llama3", "linear", "dynamic"]
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position: int = 8192


@dataclass(frozen=True)
class ModelConfig:
    """Shapes and flags of one Llama-like decoder, whatever file they came from.

    `attention_bias` adds biases to wq, wk and wv; `attention_out_bias` to wo; `mlp_bias` to w1, w2 and w3.
    `qk_norm` is an RMS norm over each head of q and k before the rotation (Qwen3).
    `sliding_window` is the number of keys a query may see, itself included, in the layers named by
    `sliding_layers`. `max_position` is the longest sequence the model was made for, in tokens.
    """

    family: str
    dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    hidden_dim: int
    vocab_size: int
    norm_eps: float
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    max_position: int = 4096
    tied_embeddings: bool = False
    attention_bias: bool = False
    attention_out_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    sliding_window: int | None = None
    sliding_layers: tuple[int, ...] = ()
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for name in ("dim", "n_layers", "n_heads", "n_kv_heads", "head_dim", "hidden_dim", "vocab_size"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 2**31:
                raise ConfigError(f"model config: {name} is {value!r}, must be a positive integer")
        if self.n_heads % self.n_kv_heads:
            raise ConfigError(f"model config: n_heads {self.n_heads} is not a multiple of n_kv_heads {self.n_kv_heads}")
        if self.head_dim % 2:
            raise ConfigError(f"model config: head_dim {self.head_dim} is odd, rotary embedding needs pairs")


TICK_TOKENS = {"cpu": 512, "cuda": 2048}
"""By the kind of device: a CPU's activations stay in its caches."""


@dataclass(frozen=True)
class RunConfig:
    """One run: which checkpoint, on what, how large. Every command's flags take their defaults from here.

    `max_seq_len` (tokens, prompt and answer) None: the model's own maximum, at most 4096.
    `max_batch_tokens`: tokens computed in one tick, prompts and newest ones together; None: see `tick_tokens`.
    `kv_cache_memory` in bytes a rank; None: what is left. `prefix_caching`: beginnings that several prompts share are
    computed once.
    `model_parallel_size` None: all ranks hold one copy of the model together; smaller than the world: replicas.
    `units` None: 8, or the model-parallel size where that is larger. `timeout` in seconds bounds every collective.
    `quantization`: how weights are packed while loading (quant/scheme.py); None: they stay in `dtype`.
    `check_every`: ticks between two comparisons of what the ranks sampled. `reproducible`: the same bits on any number
    of ranks, in any batch; None: where that costs next to nothing, on a CPU whose weights lie in panels.
    """

    ckpt_dir: str
    tokenizer_path: str | None = None
    max_seq_len: int | None = None
    max_batch_size: int = 8
    max_batch_tokens: int | None = None
    kv_cache_memory: int | None = None
    prefix_caching: bool = True
    model_parallel_size: int | None = None
    units: int | None = None
    seed: int = 1
    dtype: str = "auto"
    quantization: str | None = None
    device: str = "auto"
    chat_format: str | None = None
    timeout: float = 120.0
    check_every: int = 16
    reproducible: bool | None = None
    verbose: bool = False

    def __post_init__(self) -> None:
        for name in ("max_seq_len", "max_batch_size", "kv_cache_memory", "model_parallel_size", "units", "check_every"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"--{name} is {value}, must be at least 1")
        if self.max_batch_tokens is not None and self.max_batch_tokens < self.max_batch_size:
            raise ConfigError(
                f"--max_batch_tokens is {self.max_batch_tokens}, "
                f"must be at least --max_batch_size {self.max_batch_size}"
            )
        if self.dtype not in DTYPES:
            raise ConfigError(f"--dtype is {self.dtype!r}, must be one of {', '.join(DTYPES)}")
        if self.quantization is not None and self.quantization not in QUANTIZATIONS:
            raise ConfigError(f"--quantization is {self.quantization!r}, must be one of {', '.join(QUANTIZATIONS)}")
        if self.device not in DEVICES:
            raise ConfigError(f"--device is {self.device!r}, must be one of {', '.join(DEVICES)}")
        if not self.timeout > 0:
            raise ConfigError(f"--timeout is {self.timeout}, must be more than 0 seconds")
        if not 0 <= self.seed < 2**63:
            raise ConfigError(f"--seed is {self.seed}, must be from 0 to 2**63 - 1")

    def tick_tokens(self, device: str) -> int:
        """Tokens computed in one tick: `max_batch_tokens`, else TICK_TOKENS, or the batch size where that is larger."""
        return self.max_batch_tokens or max(TICK_TOKENS[device], self.max_batch_size)
