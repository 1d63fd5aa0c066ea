"""The same work by other programs: fresh processes in turn (A B A B), the same precision, the same threads."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from llama_dist.checkpoint.hf_writer import hf_config
from llama_dist.checkpoint.open import find_checkpoint
from llama_dist.engine.session import Checked
from llama_dist.errors import ConfigError
from llama_dist.frontend.bench.children import ChildFailed, ourselves, run_child, told
from llama_dist.frontend.bench.figures import Key
from llama_dist.frontend.bench.machine import command_line
from llama_dist.frontend.bench.results import Contender, Results, merged
from llama_dist.frontend.bench.work import (
    MIXED_NEW,
    PREFILL,
    PROMPT,
    SAMPLED,
    STEPS,
    mixed_lengths,
    random_prompt,
)
from llama_dist.frontend.options import BenchOptions
from llama_dist.parallel.launch import read_launch
from llama_dist.parallel.world import pick_device
from llama_dist.request import SamplingParams

log = logging.getLogger("llama_dist")

FOLDER = Path(__file__).parent / "contenders"
FILES: Mapping[str, tuple[str, str, str]] = {
    "transformers": ("with_transformers.py", "transformers", "pip install transformers accelerate"),
    "llama.cpp": ("with_llama_cpp.py", "llama_cpp", "CMAKE_ARGS=-DGGML_NATIVE=ON pip install llama-cpp-python"),
    "vllm": ("with_vllm.py", "vllm", "pip install vllm"),
}
"""By name: the file, the module it needs, and how that is installed."""
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


def pythons(options: BenchOptions) -> dict[str, str]:
    """Contenders and the Python of each. ConfigError where one cannot be found."""
    found = {}
    for item in options.against:
        name, _, python = item.partition("=")
        if python and not os.access(python, os.X_OK):
            raise ConfigError(f"--against {item}: no Python can be run at {python}; give a virtual environment's")
        found[name] = os.path.abspath(python) if python else sys.executable
    return found


def jobs(options: BenchOptions, vocab: int, max_seq_len: int) -> list[dict[str, Any]]:
    """The work as contenders are told of it: prompts, how many new tokens of each, and how they are drawn."""
    number = iter(range(10**9))

    def prompts(lengths: list[int]) -> list[list[int]]:
        return [list(random_prompt(next(number), length, vocab)) for length in lengths]

    made: list[dict[str, Any]] = []

    def add(name: str, size: int, lengths: list[int], new: int, temperature: float = 0.0) -> None:
        timed = new + (name in ("decode", "sampled"))  # the first token is taken off their time
        if max(lengths) + timed <= max_seq_len and name in options.work:
            job = {"name": name, "size": size, "prompts": prompts(lengths), "new": new}
            made.append(job | {"temperature": temperature, "top_p": SamplingParams.top_p if temperature else 1.0})

    for batch, steps in STEPS.items():
        add("decode", batch, [PROMPT] * batch, steps)
    for batch in SAMPLED:
        add("sampled", batch, [PROMPT] * batch, STEPS[batch], SamplingParams.temperature)
    for n in PREFILL:
        add("prefill", n, [n], 1)
    add("batch", 0, mixed_lengths(), MIXED_NEW)
    return made


def spec_of(options: BenchOptions, checked: Checked) -> dict[str, Any]:
    """All that a contender is told."""
    config = checked.reader.config
    device = pick_device(options.run, read_launch())
    model = None if options.shape is not None else str(find_checkpoint(Path(options.run.ckpt_dir).absolute())[1])
    return {
        "model": model,
        "config": hf_config(config, checked.dtype) if model is None else None,
        "dtype": str(checked.dtype).removeprefix("torch."),
        "device": device.type,
        "threads": torch.get_num_threads(),
        "max_seq_len": checked.max_seq_len,
        "max_batch_size": max(STEPS),
        "first": list(random_prompt(0, 16, config.vocab_size)),
        "jobs": jobs(options, config.vocab_size, checked.max_seq_len),
    }


def absent(name: str, python: str) -> str | None:
    """Why a contender cannot run for want of its module; None where it is there."""
    _, module, how = FILES[name]
    code = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({module!r}) is None)"
    try:
        run_child([python, "-c", code])
    except ChildFailed:
        return f"{module} is not installed for {python}; {how}, or name another Python as {name}=PATH"
    return None


def contend(name: str, python: str, spec_file: Path, threads: int) -> tuple[str, dict[Key, float]]:
    """One round of a contender: what it says of itself, and its values. ChildFailed."""
    env = {variable: str(threads) for variable in THREADS}
    out = run_child([python, str(FOLDER / "run.py"), str(FOLDER / FILES[name][0]), str(spec_file)], env)
    about, values = "", {}
    for item in told(out):
        if "about" in item:
            about = str(item["about"])
        else:
            values[str(item["name"]), int(str(item["size"]))] = float(str(item["value"]))
    return about, values


def compare(options: BenchOptions, checked: Checked) -> Results:
    """Rounds of ours and of each contender in turn; all figures, and theirs beside."""
    spec = spec_of(options, checked)
    # Ours computes in the same type, whatever it would have chosen.
    options = dataclasses.replace(options, run=dataclasses.replace(options.run, dtype=spec["dtype"]))
    wanted = pythons(options)
    left_out = []
    for name, python in list(wanted.items()):
        why = absent(name, python)
        if why is not None:
            left_out.append((name, why))
            del wanted[name]
    ours: list[Results] = []
    abouts: dict[str, str] = {}
    theirs: dict[str, dict[Key, list[float]]] = {name: {} for name in wanted}
    with tempfile.TemporaryDirectory(prefix="llama_dist-bench-") as folder:
        spec_file = Path(folder) / "spec.json"
        spec_file.write_text(json.dumps(spec))
        for number in range(options.repeats):
            log.info("round %d of %d: llama_dist", number + 1, options.repeats)
            ours.append(ourselves(options, 1, options.work))
            for name, python in list(wanted.items()):
                log.info("round %d of %d: %s", number + 1, options.repeats, name)
                try:
                    abouts[name], values = contend(name, python, spec_file, spec["threads"])
                except ChildFailed as err:
                    left_out.append((name, str(err)))
                    del wanted[name]
                    continue
                for key, value in values.items():
                    theirs[name].setdefault(key, []).append(value)
    found = merged(ours)
    return dataclasses.replace(
        found,
        about=dataclasses.replace(found.about, command=command_line()),
        left_out=[*found.left_out, *left_out],
        contenders=[Contender(name, abouts[name], values) for name, values in theirs.items() if values],
    )
