"""The references agree with one another: tiny checkpoints mean the same to transformers, to Meta's code and as GGUF."""

from __future__ import annotations

import gguf
import pytest
import torch

from tests import reference, tiny
from tests.conftest import Saver

PROMPT = [5 + (37 * i) % 280 for i in range(30)]


@pytest.mark.parametrize("name", tiny.CASES)
def test_cached_and_whole_passes_agree(name: str) -> None:
    tokens, logprobs = reference.hf_greedy(name, PROMPT, 8)
    assert len(tokens) == len(logprobs) == len(PROMPT) + 8
    if name == "llama-rope-dynamic":  # its base depends on the length, so only the prompt's part is one pass
        tokens, logprobs = tokens[: len(PROMPT)], logprobs[: len(PROMPT)]
    whole = reference.logprobs_of(reference.hf_logits(name, tokens), tokens)
    assert logprobs == pytest.approx(whole, abs=1e-4)


@pytest.mark.parametrize("form", ["hf", "hf5"])
@pytest.mark.parametrize("name", ["llama-rope-linear", "qwen2-window", "smollm2"])
def test_saved_folder_is_the_case(checkpoint: Saver, name: str, form: str) -> None:
    saved = reference.hf_logits(checkpoint(name, form), PROMPT)
    torch.testing.assert_close(saved, reference.hf_logits(name, PROMPT), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["llama-mha", "llama-9-3", "llama-meta-scaled"])
def test_meta_code_agrees_with_transformers(checkpoint: Saver, name: str) -> None:
    (tokens, logprobs), *_ = reference.meta_greedy(checkpoint(name, "meta1"), [PROMPT], 8)
    expected = reference.hf_greedy(name, PROMPT, 8)
    assert tokens == expected[0]
    assert logprobs == pytest.approx(expected[1], abs=1e-4)


@pytest.mark.parametrize("option", ["rope_scaling", "rope_theta", "sliding_window", "tie_word_embeddings"])
def test_options_matter(option: str) -> None:
    """Each flag changes the answer, or a reader that ignores it would pass."""
    name = {"sliding_window": "mistral-window", "rope_scaling": "llama-meta-scaled"}.get(option, "smollm2")
    plain = {"rope_scaling": None, "rope_theta": 10000.0, "sliding_window": None, "tie_word_embeddings": False}
    case = tiny.CASES[name]
    from transformers import AutoConfig, AutoModelForCausalLM

    options = {k: v for k, v in case.config.items() if k != "model_type"} | {option: plain[option]}
    config = AutoConfig.for_model(case.model_type, **options)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    model.load_state_dict(tiny.weights(case), strict=False)
    with torch.inference_mode():
        changed = model(torch.tensor([PROMPT])).logits[0]
    assert (changed - reference.hf_logits(name, PROMPT)).abs().max() > 1e-2


def test_gguf_holds_every_tensor(checkpoint: Saver) -> None:
    for name in ("llama-gqa", "qwen3"):
        stored = {t.name: t for t in gguf.GGUFReader(checkpoint(name, "gguf-Q8_0")).tensors}
        wanted = tiny.gguf_state(tiny.CASES[name])
        assert stored.keys() == wanted.keys()
        for key, value in wanted.items():
            decoded = gguf.dequantize(stored[key].data, stored[key].tensor_type)
            torch.testing.assert_close(torch.from_numpy(decoded.copy()), value, rtol=0, atol=0.05)
