"""llama.cpp by llama_cpp_python's low-level functions: prompts packed into batches, then a token a sequence at a time.

Each sequence has a KV stream of its own, as llama-batched-bench has it by default for many sequences.
"""

from __future__ import annotations

import ctypes
import os
from typing import Any

import llama_cpp as lib
import numpy as np

BATCH = 2048  # tokens of a call

state: dict[str, Any] = {}


@lib.llama_log_callback  # type: ignore[untyped-decorator]
def _quiet(*_: Any) -> None:
    """Its log is no result."""


def load(spec: dict[str, Any]) -> str:
    path = spec["model"]
    if path is None or os.path.isdir(path):
        raise ValueError(
            "llama.cpp reads GGUF files only: give one as --ckpt_dir; its convert_hf_to_gguf.py makes one of a Hugging "
            "Face folder (--outtype bf16), which `llama_dist convert` makes of anything else"
        )
    lib.llama_log_set(_quiet, None)
    lib.llama_backend_init()
    params = lib.llama_model_default_params()
    params.n_gpu_layers = 0 if spec["device"] == "cpu" else 999
    model = lib.llama_model_load_from_file(path.encode(), params)
    if not model:
        raise ValueError(f"llama.cpp cannot load {path}")
    text = ctypes.create_string_buffer(128)
    lib.llama_model_desc(model, text, len(text))
    vocab = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(model))
    state.update(model=model, vocab=vocab, spec=spec, batch=lib.llama_batch_init(BATCH, 0, 1), sequences=0, length=0)
    return f"llama.cpp ({lib.__name__} {lib.__version__}), {text.value.decode()} as the file has it"


def make_room(prompts: list[list[int]], new: int) -> None:
    """A context for these; one that is large enough is kept."""
    sequences, length = len(prompts), -(-(max(map(len, prompts)) + new) // 256) * 256
    if state["sequences"] == sequences and state["length"] >= length:
        return
    if state["sequences"]:
        lib.llama_free(state["context"])
    params = lib.llama_context_default_params()
    params.n_ctx, params.n_seq_max = sequences * length, sequences
    params.n_batch = BATCH
    params.n_threads = params.n_threads_batch = state["spec"]["threads"]
    params.kv_unified = False
    params.no_perf = True
    made = lib.llama_init_from_model(state["model"], params)
    if not made:
        raise MemoryError(f"llama.cpp makes no context for {sequences} x {length} tokens")
    state.update(context=made, sequences=sequences, length=length)


def sampler_of(temperature: float, top_p: float) -> Any:
    """Its chain of samplers; None: greedy."""
    if not temperature:
        return None
    chain = lib.llama_sampler_chain_init(lib.llama_sampler_chain_default_params())
    for part in (
        lib.llama_sampler_init_temp(temperature),
        lib.llama_sampler_init_top_p(top_p, 1),
        lib.llama_sampler_init_dist(0),
    ):
        lib.llama_sampler_chain_add(chain, part)
    return chain


def decode(made: Any, items: list[tuple[int, int, int, bool]], sampler: Any) -> list[int]:
    """Run (token, position, sequence, whether its logits are wanted); the next token of each that is."""
    batch = state["batch"]
    for i, (token, position, sequence, wanted) in enumerate(items):
        batch.token[i], batch.pos[i], batch.n_seq_id[i] = token, position, 1
        batch.seq_id[i][0], batch.logits[i] = sequence, wanted
    batch.n_tokens = len(items)
    code = lib.llama_decode(made, batch)
    assert code == 0, f"llama_decode returned {code}"
    n = sum(wanted for *_, wanted in items)
    if not n:
        return []
    if sampler is not None:
        return [lib.llama_sampler_sample(sampler, made, i) for i, (*_, wanted) in enumerate(items) if wanted]
    logits = ctypes.cast(lib.llama_get_logits(made), ctypes.POINTER(ctypes.c_float))
    ids: list[int] = np.ctypeslib.as_array(logits, (n, state["vocab"])).argmax(1).tolist()
    return ids


def generate(prompts: list[list[int]], new: int, temperature: float, top_p: float) -> list[list[int]]:
    make_room(prompts, new)
    sampler = sampler_of(temperature, top_p)
    made = state["context"]
    lib.llama_memory_clear(lib.llama_get_memory(made), False)
    items = [
        (token, i, number, i == len(prompt) - 1)
        for number, prompt in enumerate(prompts)
        for i, token in enumerate(prompt)
    ]
    newest: list[int] = []
    for start in range(0, len(items), BATCH):
        newest += decode(made, items[start : start + BATCH], sampler)
    answers = [[token] for token in newest]
    for step in range(new - 1):
        newest = decode(made, [(token, len(prompts[i]) + step, i, True) for i, token in enumerate(newest)], sampler)
        for answer, token in zip(answers, newest, strict=True):
            answer.append(token)
    if sampler is not None:
        lib.llama_sampler_free(sampler)
    return answers
