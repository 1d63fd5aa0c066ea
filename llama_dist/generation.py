"""Llama: the API of Meta's `llama` package (build, generate, text_completion, chat_completion) on the engine here.

Every rank calls the same methods with the same arguments and gets the same results, as under Meta's loop.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import TypedDict

from llama_dist.config import RunConfig
from llama_dist.engine.session import Session, complete, open_session
from llama_dist.model.transformer import Transformer
from llama_dist.request import Request, SamplingParams
from llama_dist.text.base import Tokenizer
from llama_dist.text.chat import Dialog, Message, encode_dialog, has_special_tags, pick_chat_format

__all__ = ["ChatPrediction", "CompletionPrediction", "Dialog", "Llama", "Message"]

UNSAFE_ERROR = "Error: special tags are not allowed as part of the prompt."
DEFAULTS = SamplingParams()


class CompletionPrediction(TypedDict, total=False):
    """`tokens` (each as text) and `logprobs` only where logprobs were asked for."""

    generation: str
    tokens: list[str]
    logprobs: list[float]


class ChatPrediction(TypedDict, total=False):
    """The assistant's next message; `tokens` and `logprobs` only where logprobs were asked for."""

    generation: Message
    tokens: list[str]
    logprobs: list[float]


class Llama:
    """A loaded model, sharded over the ranks that called `build`."""

    @staticmethod
    def build(
        ckpt_dir: str,
        tokenizer_path: str | None = None,
        max_seq_len: int | None = None,
        max_batch_size: int = RunConfig.max_batch_size,
        model_parallel_size: int | None = None,
        seed: int = RunConfig.seed,
        *,
        dtype: str = RunConfig.dtype,
        quantization: str | None = None,
        device: str = RunConfig.device,
        chat_format: str | None = None,
        reproducible: bool | None = RunConfig.reproducible,
    ) -> Llama:
        """Join the ranks torchrun or srun started and load the checkpoint in `ckpt_dir`.

        `max_seq_len` in tokens, prompt and answer together; more prompts than `max_batch_size` wait their turn.
        `model_parallel_size` None: all ranks hold one copy together. `quantization` "int8", "int4" or "fp8" packs the
        weights while they are loaded. `reproducible`: the same bits on any number of ranks, in any batch; None: see
        RunConfig. Raises ConfigError or CheckpointError before any rank is met. As with Meta's build, ranks above 0
        print nothing to stdout from here on, so that a script's own `print` says things once.
        """
        run = RunConfig(
            ckpt_dir=ckpt_dir,
            tokenizer_path=tokenizer_path,
            max_seq_len=max_seq_len,
            max_batch_size=max_batch_size,
            model_parallel_size=model_parallel_size,
            seed=seed,
            dtype=dtype,
            quantization=quantization,
            device=device,
            chat_format=chat_format,
            reproducible=reproducible,
        )
        session = open_session(run)
        if session.world.rank > 0:
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115
        return Llama(session)

    def __init__(self, session: Session) -> None:
        self.session = session
        self._calls = 0

    @property
    def model(self) -> Transformer:
        return self.session.engine.model

    @property
    def tokenizer(self) -> Tokenizer:
        return self.session.tokenizer

    def generate(
        self,
        prompt_tokens: Sequence[Sequence[int]],
        max_gen_len: int,
        temperature: float = DEFAULTS.temperature,
        top_p: float = DEFAULTS.top_p,
        logprobs: bool = False,
        echo: bool = False,
    ) -> tuple[list[list[int]], list[list[float]] | None]:
        """Complete each prompt (token ids): lists of ids, and of their logprobs or None.

        A row ends before the first of the model's stop ids, after `max_gen_len` new tokens, or at max_seq_len. With
        `echo` the prompt stands before the answer in both lists; its first token has logprob 0.0. Logprobs are natural
        logs of the unscaled model distribution. Raises RequestError for an empty or too long prompt.
        """
        self._calls += 1  # a later call with the same prompt draws other samples, as with a running generator
        params = SamplingParams(
            temperature=temperature, top_p=top_p, max_tokens=max_gen_len, logprobs=logprobs, echo=echo
        )
        requests = [Request(f"{self._calls}/{i}", tuple(p), params) for i, p in enumerate(prompt_tokens)]
        completions = complete(self.session, requests)
        tokens = [list(c.token_ids) for c in completions]
        return tokens, [list(c.logprobs or ()) for c in completions] if logprobs else None

    def text_completion(
        self,
        prompts: Sequence[str],
        temperature: float = DEFAULTS.temperature,
        top_p: float = DEFAULTS.top_p,
        max_gen_len: int | None = None,
        logprobs: bool = False,
        echo: bool = False,
    ) -> list[CompletionPrediction]:
        """Continue each text. `max_gen_len` None: as far as max_seq_len allows."""
        tokenizer = self.tokenizer
        ids = [tokenizer.encode(p, bos=tokenizer.add_bos, eos=False) for p in prompts]
        tokens, scores = self.generate(ids, self._length(max_gen_len), temperature, top_p, logprobs, echo)
        if scores is None:
            return [{"generation": tokenizer.decode(t)} for t in tokens]
        return [
            {"generation": tokenizer.decode(t), "tokens": [tokenizer.decode([x]) for x in t], "logprobs": s}
            for t, s in zip(tokens, scores, strict=True)
        ]

    def chat_completion(
        self,
        dialogs: Sequence[Dialog],
        temperature: float = DEFAULTS.temperature,
        top_p: float = DEFAULTS.top_p,
        max_gen_len: int | None = None,
        logprobs: bool = False,
    ) -> list[ChatPrediction]:
        """The assistant's next message in each dialog, in the checkpoint's chat format.

        In Llama 2's format a dialog whose content holds one of its tags is answered by an error text, as Meta does.
        """
        tokenizer = self.tokenizer
        style = pick_chat_format(tokenizer, self.session.config.family, self.session.run.chat_format)
        unsafe = [style == "llama2" and has_special_tags(dialog) for dialog in dialogs]
        safe = [encode_dialog(tokenizer, d, style) for d, bad in zip(dialogs, unsafe, strict=True) if not bad]
        tokens, scores = self.generate(safe, self._length(max_gen_len), temperature, top_p, logprobs)
        answers: list[ChatPrediction] = []
        for i, t in enumerate(tokens):
            answer: ChatPrediction = {"generation": {"role": "assistant", "content": tokenizer.decode(t)}}
            if scores is not None:
                answer["tokens"], answer["logprobs"] = [tokenizer.decode([x]) for x in t], scores[i]
            answers.append(answer)
        refused: ChatPrediction = {"generation": {"role": "assistant", "content": UNSAFE_ERROR}}
        rest = iter(answers)
        return [refused.copy() if bad else next(rest) for bad in unsafe]

    def _length(self, max_gen_len: int | None) -> int:
        return self.session.max_seq_len - 1 if max_gen_len is None else max_gen_len
