"""vLLM's offline `LLM`, without its prefix cache. Its own variables (VLLM_…) are taken from the environment."""

from __future__ import annotations

import json
import os
import tempfile
from typing import Any

import vllm
from vllm import LLM, SamplingParams

llm: Any = None


def load(spec: dict[str, Any]) -> str:
    global llm
    model, more = spec["model"], {}
    if model is None:  # random weights of the same shape: a folder with nothing but the shape
        model = tempfile.mkdtemp(prefix="llama_dist-bench-")
        with open(os.path.join(model, "config.json"), "w") as file:
            json.dump(spec["config"], file)
        more = {"load_format": "dummy"}
    elif not os.path.isdir(model):
        raise ValueError(f"{model} is no Hugging Face folder; make one with `llama_dist convert`")
    llm = LLM(
        model=model,
        dtype=spec["dtype"],
        max_model_len=spec["max_seq_len"],
        max_num_seqs=spec["max_batch_size"],
        enable_prefix_caching=False,
        skip_tokenizer_init=True,
        disable_log_stats=True,
        seed=0,
        **more,
    )
    return f"vLLM {vllm.__version__}, {spec['dtype']}"


def generate(prompts: list[list[int]], new: int, temperature: float, top_p: float) -> list[list[int]]:
    params = SamplingParams(
        temperature=temperature, top_p=top_p, max_tokens=new, min_tokens=new, ignore_eos=True, detokenize=False
    )
    outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], params, use_tqdm=False)
    return [list(output.outputs[0].token_ids) for output in outputs]
