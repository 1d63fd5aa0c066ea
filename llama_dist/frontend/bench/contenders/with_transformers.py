"""Hugging Face transformers: `generate`, eager, of batches sorted by length."""

from __future__ import annotations

import os
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM

BATCH = 64  # prompts at once, as many as ours has
PAD = 0
GREEDY = {"do_sample": False}

model: Any = None


def load(spec: dict[str, Any]) -> str:
    global model
    if spec["device"] == "cpu":
        torch.set_num_threads(spec["threads"])
    torch.manual_seed(0)
    dtype = getattr(torch, spec["dtype"])
    path = spec["model"]
    if path is None:
        settings = dict(spec["config"])
        config = AutoConfig.for_model(settings.pop("model_type"), **settings)
        with torch.device(spec["device"]):
            torch.set_default_dtype(dtype)
            model = AutoModelForCausalLM.from_config(config)
            torch.set_default_dtype(torch.float32)
    elif os.path.isdir(path):
        model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
    else:
        folder, file = os.path.split(path)
        model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=dtype)
    model = model.to(spec["device"], dtype).eval()
    return f"transformers {transformers.__version__}, torch {torch.__version__}, {spec['dtype']}"


@torch.inference_mode()
def batch(prompts: list[list[int]], new: int, temperature: float, top_p: float) -> list[list[int]]:
    """One call, prompts filled up on the left."""
    width = max(map(len, prompts))
    rows = [[PAD] * (width - len(prompt)) + prompt for prompt in prompts]
    mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    ids = model.generate(
        input_ids=torch.tensor(rows, device=model.device),
        attention_mask=torch.tensor(mask, device=model.device),
        max_new_tokens=new,
        min_new_tokens=new,
        **({"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0} if temperature else GREEDY),
        eos_token_id=None,
        pad_token_id=PAD,
    )
    answers: list[list[int]] = ids[:, width:].tolist()
    return answers


def generate(prompts: list[list[int]], new: int, temperature: float, top_p: float) -> list[list[int]]:
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    answers: list[list[int]] = [[] for _ in prompts]
    for start in range(0, len(order), BATCH):
        some = order[start : start + BATCH]
        for i, answer in zip(some, batch([prompts[i] for i in some], new, temperature, top_p), strict=True):
            answers[i] = answer
    return answers
