"""What the tests run on every rank (by tests/spmd.py): a session a checkpoint, and answers as plain lists."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from llama_dist.config import RunConfig
from llama_dist.engine.engine import Engine
from llama_dist.engine.session import Session, check_run, complete, open_session
from llama_dist.errors import DesyncError, RequestError
from llama_dist.generation import Llama
from llama_dist.model.cache import PAGE_SIZE
from llama_dist.parallel import shared
from llama_dist.parallel.launch import read_launch
from llama_dist.request import Request, SamplingParams
from llama_dist.text.chat import encode_dialog, pick_chat_format

Answer = tuple[list[int], list[float], str]


@dataclass(frozen=True)
class Ask:
    """Prompts for one checkpoint, and how to run it. `run` overrides RunConfig, `params` SamplingParams."""

    folder: str
    prompts: Sequence[Sequence[int]]
    max_tokens: int
    run: dict[str, Any] = field(default_factory=dict)
    params: dict[str, Any] = field(default_factory=dict)


def open_for(ask: Ask) -> Session:
    options = {"dtype": "float32", "device": "cpu", "max_seq_len": 96, "check_every": 1, "timeout": 60.0, **ask.run}
    return open_session(RunConfig(ckpt_dir=ask.folder, **options))


def answers(asks: Sequence[Ask]) -> list[list[Answer]]:
    """For each ask the answers to its prompts: tokens and logprobs (the prompt's too by default), and why it ended."""
    return [answer(open_for(ask), ask) for ask in asks]


def answer(session: Session, ask: Ask) -> list[Answer]:
    options = {"temperature": 0.0, "logprobs": True, "echo": True, **ask.params}
    params = SamplingParams(max_tokens=ask.max_tokens, **options)
    requests = [Request(f"{i}", tuple(ids), params) for i, ids in enumerate(ask.prompts)]
    done = complete(session, requests)
    return [(list(c.token_ids), list(c.logprobs or ()), c.finish_reason) for c in done]


def answers_of_a_mode_that_is_over(ask: Ask) -> list[Answer]:
    """Answers of a session that was opened in torch's inference mode, by ranks that share no memory."""
    shared.attach = lambda *_: None  # type: ignore[assignment]
    with torch.inference_mode():
        session = open_for(ask)
    return answer(session, ask)


def chat_ids(folder: str, questions: Sequence[str]) -> list[list[int]]:
    """Each question as the only user message of a dialog, in the checkpoint's own chat format."""
    checked = check_run(RunConfig(ckpt_dir=folder))
    style = pick_chat_format(checked.tokenizer, checked.reader.config.family, None)
    return [encode_dialog(checked.tokenizer, [{"role": "user", "content": q}], style) for q in questions]


def llama_calls(folder: str, mp_size: int | None, reproducible: bool | None = None) -> dict[str, Any]:
    """What Meta's API returns on this rank, for several ways to call it."""
    how: dict[str, Any] = {"seed": 5, "dtype": "float32", "device": "cpu", "reproducible": reproducible}
    llama = Llama.build(folder, f"{folder}/tokenizer.json", 64, 3, mp_size, **how)
    prompts = [[5, 250, 17], [42], [201, 13, 88, 5, 90], [9] * 20, [100, 101]]
    greedy, none = llama.generate(prompts, 8, temperature=0)
    sampled = llama.generate(prompts, 8, temperature=1.5, top_p=0.95)[0]
    again = llama.generate(prompts, 8, temperature=1.5, top_p=0.95)[0]
    tokens, logprobs = llama.generate(prompts, 8, temperature=1.0, logprobs=True, echo=True)
    assert logprobs is not None
    rescored = llama.generate(tokens, 0, temperature=0, logprobs=True, echo=True)
    return {
        "greedy": greedy,
        "none": none,
        "sampled": sampled,
        "again": again,
        "tokens": tokens,
        "logprobs": logprobs,
        "rescored": rescored,
        "prompts": prompts,
        "text": llama.text_completion(["hello", "a b"], temperature=0, max_gen_len=5),
        "text_logprobs": llama.text_completion(["hello"], temperature=0, max_gen_len=5, logprobs=True, echo=True),
        "chat": llama.chat_completion([[{"role": "user", "content": "hello"}]], temperature=0, max_gen_len=5),
        "errors": [_error(llama, ids) for ids in ([], [1] * 65, [5, 10**6], [-1])],
        "full": llama.generate([[7] * 64, [7] * 62], 8, temperature=0)[0],
        "nothing": llama.generate([], 8),
    }


def _error(llama: Llama, ids: list[int]) -> tuple[str, str | None]:
    try:
        llama.generate([[5], ids], 4)
    except RequestError as err:
        return str(err), err.field
    return "no error", None


def one_rank_samples_differently(folder: str) -> str:
    """Rank 1 draws another token at its third position: what each rank then raises."""
    session = open_for(Ask(folder, [], 0))
    if session.world.rank == 1:
        drawn = Engine._choose

        def other(self: Engine, drawing: Any, logits: Any) -> list[Any]:
            third = [len(work.sequence.tokens) == 5 for work, _ in drawing]
            tokens = drawn(self, drawing, logits)
            return [(token + 1) % 200 if it else token for token, it in zip(tokens, third, strict=True)]

        Engine._choose = other  # type: ignore[method-assign]
    try:
        answer(session, Ask(folder, [[5, 6, 7]], 8))
    except DesyncError as err:
        return str(err)
    return "no error"


def other_prompts(folder: str) -> str:
    """Rank 2 is called with another prompt: what each rank then raises."""
    session = open_for(Ask(folder, [], 0))
    try:
        answer(session, Ask(folder, [[5, 6, 7 + (session.world.rank == 2)]], 8))
    except DesyncError as err:
        return str(err)
    return "no error"


def weight_bytes(session: Session) -> int:
    return sum(weight.nbytes for weight, _ in session.engine.model.weights().values())


def bytes_held(folder: str, quantization: str | None = None) -> dict[str, int]:
    """Bytes of weights and of cache this rank allocated."""
    session = open_for(Ask(folder, [], 0, {"max_batch_size": 2, "quantization": quantization}))
    cache = session.engine.cache
    return {
        "weights": weight_bytes(session),
        "cache": cache.n_bytes,
        "cache_tokens": cache.n_pages * PAGE_SIZE,
    }


def load_peak(folder: str, quantization: str | None = None) -> tuple[int, int]:
    """Bytes by which opening a session raised this process's peak memory, and bytes of the weights it then holds."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from what is resident now
    before = _status("VmRSS")
    session = open_for(Ask(folder, [], 0, {"quantization": quantization}))
    return _status("VmHWM") - before, weight_bytes(session)


def _status(key: str) -> int:
    (line,) = [x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(f"{key}:")]
    return int(line.split()[1]) * 1024


def other_flags(folders: Sequence[str], **options: Any) -> str:
    """Rank 1 has another checkpoint, or other flags: what each rank then raises."""
    rank = read_launch().rank
    folder = folders[rank % len(folders)]
    try:
        open_for(Ask(folder, [], 0, {k: v[rank] for k, v in options.items()}))
    except DesyncError as err:
        return str(err)
    return "no error"


def other_seed(folder: str) -> str:
    return other_flags([folder], seed=[3, 4, 3], max_batch_size=[8, 9, 8])


def slow_replica(folder: str) -> list[list[int]]:
    """Answers of a world whose replicas are done longer apart than the timeout."""
    run = RunConfig(folder, max_seq_len=64, model_parallel_size=1, dtype="float32", device="cpu", timeout=8.0)
    llama = Llama(open_session(run))
    real = Engine.step

    def step(self: Engine, *args: Any) -> Any:
        if llama.session.world.replica == 1 and self.ticks == 1:
            time.sleep(10)
        return real(self, *args)

    Engine.step = step  # type: ignore[method-assign]
    return llama.generate([[5, 6, 7], [8, 9], [10]], 4, 0.0)[0]
