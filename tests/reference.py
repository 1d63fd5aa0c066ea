"""Plain reference answers: Hugging Face transformers, and Meta's own Llama 3 model code.

`python -m tests.reference FOLDER IN OUT` is the process in which Meta's code runs: it wants fairscale's groups, which
the tests' own process must stay free of.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import torch

from tests import assets, tiny


@functools.lru_cache(maxsize=4)
def hf_model(source: str | Path) -> Any:
    """transformers' model of a tiny case (by name) or of a Hugging Face folder: float32, eager attention."""
    from transformers import AutoConfig, AutoModelForCausalLM

    if isinstance(source, Path):
        model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, attn_implementation="eager")
        return model.eval()
    case = tiny.CASES[source]
    options = {key: value for key, value in case.config.items() if key != "model_type"}
    config = AutoConfig.for_model(case.model_type, **options)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager")
    missing, extra = model.load_state_dict(tiny.weights(case), strict=False)
    if extra or missing not in ([], ["lm_head.weight"]) or bool(missing) != case.tied:
        raise ValueError(f"{source}: transformers misses {missing} and does not know {extra}")
    return model.eval()


def _forget(model: Any) -> None:
    # Dynamic rope keeps the base of the longest sequence it ever met, until it meets a short one.
    if model.config.rope_parameters["rope_type"] == "dynamic":
        model(torch.tensor([[0]]), use_cache=False)


@torch.inference_mode()
def hf_logits(source: str | Path, ids: Sequence[int]) -> torch.Tensor:
    """Float32 logits of one forward pass over the whole sequence, without a cache: (len(ids), vocab)."""
    model = hf_model(source)
    _forget(model)
    return model(torch.tensor([list(ids)]), use_cache=False).logits[0].float()


@torch.inference_mode()
def hf_greedy(
    source: str | Path, prompt_ids: Sequence[int], n: int, stop: Collection[int] = (), cache: bool = True
) -> tuple[list[int], list[float]]:
    """Prompt and up to `n` greedy tokens, and the logprob of each; the first token's is 0.0.

    Argmax ties go to the lowest id. A token of `stop` ends the answer and is left out. With `cache` this is what
    `generate` of transformers computes; without, every step is one whole forward pass (another result only for
    dynamic rope scaling, where the base then also changes for keys already seen).
    """
    model = hf_model(source)
    _forget(model)
    tokens, logprobs = list(prompt_ids), [0.0]
    past, fresh = None, tokens
    for step in range(n + 1):
        out = model(torch.tensor([fresh]), past_key_values=past, use_cache=cache)
        scores = out.logits[0].float().log_softmax(-1)
        if step == 0:
            logprobs += [scores[i, token].item() for i, token in enumerate(tokens[1:])]
        best = int(scores[-1].argmax())
        if step == n or best in stop:
            break
        tokens.append(best)
        logprobs.append(scores[-1, best].item())
        past, fresh = (out.past_key_values, [best]) if cache else (None, tokens)
    return tokens, logprobs


def logprobs_of(logits: torch.Tensor, ids: Sequence[int]) -> list[float]:
    """Logprob of each token given those before it, from logits (len(ids), vocab); the first is 0.0."""
    scores = logits.float().log_softmax(-1)
    return [0.0, *(scores[i, token].item() for i, token in enumerate(ids[1:]))]


def meta_logits(folder: Path, sequences: Sequence[Sequence[int]]) -> list[torch.Tensor]:
    """Meta's Llama 3 code over `consolidated.00.pth` in float32: logits (len, vocab) for each sequence of ids."""
    return [logits for _, logits in _ask_meta(folder, [(list(ids), 0) for ids in sequences])]


def meta_greedy(folder: Path, prompts: Sequence[Sequence[int]], n: int) -> list[tuple[list[int], list[float]]]:
    """Greedy answers of Meta's code with its own cache: for each prompt, its tokens and `n` more with logprobs.

    As `hf_greedy` gives them, the logprobs from one forward pass over the whole.
    """
    answers = _ask_meta(folder, [(list(ids), n) for ids in prompts])
    return [(tokens.tolist(), logprobs_of(logits, tokens.tolist())) for tokens, logits in answers]


def _ask_meta(folder: Path, asked: list[tuple[list[int], int]]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    root = Path(__file__).resolve().parent.parent
    path = os.pathsep.join([str(root), str(assets.llama_models_path())])
    with tempfile.TemporaryDirectory() as temp:
        question, answer = Path(temp) / "ids.json", Path(temp) / "logits.pt"
        question.write_text(json.dumps(asked))
        command = [sys.executable, "-m", "tests.reference", str(folder), str(question), str(answer)]
        env = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, cwd=root, env=env, capture_output=True, text=True, timeout=120)
        if done.returncode:
            raise RuntimeError(f"Meta's reference failed on {folder}:\n{done.stderr}")
        return list(torch.load(answer, weights_only=True))


def _run_meta(folder: Path, question: Path, answer: Path) -> None:
    import fairscale.nn.model_parallel.initialize as groups
    from llama_models.llama3.args import ModelArgs
    from llama_models.llama3.model import Transformer

    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    groups.initialize_model_parallel(1)
    asked = json.loads(question.read_text())
    params = json.loads((folder / "params.json").read_text())
    longest = max(len(ids) + n for ids, n in asked)
    model = Transformer(ModelArgs(**params | {"max_seq_len": longest, "max_batch_size": 1}))
    state = torch.load(folder / "consolidated.00.pth", map_location="cpu", weights_only=True)
    state.pop("rope.freqs", None)
    model.load_state_dict({name: value.float() for name, value in state.items()}, strict=True)
    answers = []
    for ids, n in asked:
        fresh = ids
        for _ in range(n):
            start = len(ids) - len(fresh)
            fresh = [int(model(torch.tensor([fresh]), start)[0, -1].argmax())]
            ids = ids + fresh
        answers.append((torch.tensor(ids), model(torch.tensor([ids]), 0)[0].clone()))
    torch.save(answers, answer)


if __name__ == "__main__":
    _run_meta(*(Path(argument) for argument in sys.argv[1:4]))
