"""`plan`: what a model needs of so many GPUs, and the command to start it. No GPU is asked and no weight read."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import torch

from llama_dist.checkpoint.open import open_checkpoint
from llama_dist.config import ModelConfig
from llama_dist.engine.engine import LOGIT_ROWS
from llama_dist.engine.plan import Load, Terms, largest, loading_peak, rank_terms, units_of, waste
from llama_dist.engine.session import DEFAULT_SEQ_LEN, pick_dtype
from llama_dist.errors import ConfigError
from llama_dist.frontend.options import PlanOptions
from llama_dist.frontend.output import Output
from llama_dist.frontend.sizes import show_bytes

MOST_BATCH = 1 << 20
MOST_GPUS = 256  # how far to look for a number of GPUs that would do
GPUS_A_HOST = 8


@dataclass(frozen=True)
class Plan:
    """One number of GPUs. `terms` are bytes a GPU for `load`, what was asked for; `best` is what to run, None: nothing.

    `largest_batch` fits at the asked length, `largest_length` at the asked batch, `longest` alone; 0: none does.
    """

    gpus: int
    memory: int
    load: Load
    terms: Terms
    loading_peak: int
    waste: float
    largest_batch: int
    largest_length: int
    longest: int

    @property
    def fits(self) -> bool:
        return self.terms.total <= self.memory

    @property
    def best(self) -> Load | None:
        if self.fits:
            return self.load
        if self.largest_batch:
            return self.load.resized(self.largest_batch, self.load.length)
        return self.load.resized(1, self.longest) if self.longest else None


def make_plan(
    config: ModelConfig,
    gpus: int,
    memory: int,
    load: Load,
    dtype_bytes: int,
    asked_units: int | None,
    quantization: str | None = None,
) -> Plan:
    """The plan for `gpus` of `memory` bytes each."""
    units = units_of(config, gpus, asked_units)

    def fits(batch: int, length: int) -> bool:
        return rank_terms(config, units, gpus, dtype_bytes, load.resized(batch, length), quantization).total <= memory

    longest = max(load.length, config.max_position)
    return Plan(
        gpus,
        memory,
        load,
        rank_terms(config, units, gpus, dtype_bytes, load, quantization),
        loading_peak(config, units, gpus, dtype_bytes, quantization),
        waste(config, units, gpus),
        largest(lambda batch: fits(batch, load.length), MOST_BATCH),
        largest(lambda length: fits(load.batch, length), longest),
        largest(lambda length: fits(1, length), longest),
    )


def prepare(options: PlanOptions) -> Callable[[], int]:
    """Read the headers and count; showing it comes back. Raises CheckpointError, or ConfigError for --units."""
    run = options.run
    if run.units is not None and run.units < max(options.gpus):
        raise ConfigError(f"--units {run.units} is less than {max(options.gpus)} GPUs; use {max(options.gpus)} or more")
    reader = open_checkpoint(run.ckpt_dir)
    reader.close()
    dtype = pick_dtype(run, reader, torch.device("cuda"))
    length = run.max_seq_len or min(reader.config.max_position, DEFAULT_SEQ_LEN)
    load = Load(run.max_batch_size, length, run.tick_tokens("cuda"), LOGIT_ROWS)
    plans = [
        make_plan(reader.config, n, min(options.gpu_memory), load, dtype.itemsize, run.units, run.quantization)
        for n in options.gpus
    ]
    return lambda: show(options, reader.config, plans, str(dtype).removeprefix("torch."), dtype.itemsize)


def show(options: PlanOptions, config: ModelConfig, plans: Sequence[Plan], dtype: str, dtype_bytes: int) -> int:
    """Write the plans to stdout. ConfigError saying why when there is no number of GPUs that could run anything."""
    output = Output()
    if options.json:
        for plan in plans:
            output.write(json.dumps(as_json(plan, options, dtype)) + "\n")
    else:
        output.write(text_of(options, config, plans, dtype))
    if all(plan.best is None for plan in plans):
        raise ConfigError(why_not(config, plans[-1], dtype_bytes, options.run.units, options.run.quantization))
    return output.exit_code


def command(plan: Plan, options: PlanOptions) -> str | None:
    """The torchrun command that runs the best of a plan."""
    if plan.best is None:
        return None
    hosts = -(-plan.gpus // GPUS_A_HOST)
    if hosts == 1 or plan.gpus % hosts:
        where = ["--standalone", "--nproc_per_node", str(plan.gpus)]
    else:
        where = ["--nnodes", str(hosts), "--nproc_per_node", str(plan.gpus // hosts)]
        where += ["--rdzv_backend", "c10d", "--rdzv_endpoint", "HOST0:29500"]
    words = ["torchrun", *where, "-m", "llama_dist", "generate", "--ckpt_dir", options.run.ckpt_dir]
    words += ["--max_seq_len", str(plan.best.length), "--max_batch_size", str(plan.best.batch)]
    if options.run.dtype != "auto":
        words += ["--dtype", options.run.dtype]
    if options.run.quantization is not None:
        words += ["--quantization", options.run.quantization]
    if options.run.units is not None:
        words += ["--units", str(options.run.units)]
    return shlex.join(words) + ' --prompt "..."'


def term_name(field: str) -> str:
    """A field of Terms for people to read."""
    return field.replace("kv", "KV").replace("_", " ")


def why_not(
    config: ModelConfig, plan: Plan, dtype_bytes: int, asked_units: int | None, quantization: str | None = None
) -> str:
    """One line: the largest term of the smallest run, what is missing, and what would do."""
    units = units_of(config, plan.gpus, asked_units)
    terms = rank_terms(config, units, plan.gpus, dtype_bytes, replace(plan.load, batch=1, length=1), quantization)
    name = max((f.name for f in fields(terms)), key=lambda name: int(getattr(terms, name)))
    text = (
        f"nothing fits: on {plan.gpus} GPU{'' if plan.gpus == 1 else 's'} even one sequence of one token takes "
        f"{show_bytes(terms.total)} a GPU, {show_bytes(terms.total - plan.memory)} more than it has; "
        f"{term_name(name)} alone {'take' if name.endswith('s') else 'takes'} "
        f"{show_bytes(int(getattr(terms, name)))}"
    )
    for n in range(plan.gpus + 1, min(MOST_GPUS, asked_units or MOST_GPUS) + 1):
        cut = units_of(config, n, asked_units)
        more = rank_terms(config, cut, n, dtype_bytes, replace(plan.load, batch=1), quantization)
        if more.total <= plan.memory:
            return f"{text}; {n} GPUs would do"
    return f"{text}; use larger GPUs, a smaller --dtype or --quantization int4"


def as_json(plan: Plan, options: PlanOptions, dtype: str) -> dict[str, Any]:
    """A plan for a program: bytes are a GPU's, `loading_peak` is host memory."""
    return {
        "gpus": plan.gpus,
        "gpu_memory": plan.memory,
        "dtype": dtype,
        "quantization": options.run.quantization,
        "max_batch_size": plan.load.batch,
        "max_seq_len": plan.load.length,
        "fits": plan.fits,
        "bytes": {**asdict(plan.terms), "total": plan.terms.total},
        "loading_peak": plan.loading_peak,
        "waste": plan.waste,
        "largest_batch": plan.largest_batch,
        "largest_length": plan.largest_length,
        "longest": plan.longest,
        "command": command(plan, options),
    }


def text_of(options: PlanOptions, config: ModelConfig, plans: Sequence[Plan], dtype: str) -> str:
    """A column for each number of GPUs, then the commands."""
    load, memory = plans[0].load, plans[0].memory
    weights = f" with {options.run.quantization} weights" if options.run.quantization else ""
    rows: list[tuple[str, list[str]]] = [("GPUs", [str(p.gpus) for p in plans])]
    for field in fields(Terms):
        rows.append((term_name(field.name), [show_bytes(getattr(p.terms, field.name)) for p in plans]))
    rows += [
        ("total a GPU", [show_bytes(p.terms.total) for p in plans]),
        ("fits", ["yes" if p.fits else f"{show_bytes(p.terms.total - p.memory)} over" for p in plans]),
        (f"largest batch of {load.length} tokens", [str(p.largest_batch or "none") for p in plans]),
        (f"largest length, batch {load.batch}", [str(p.largest_length or "none") for p in plans]),
        ("largest length, batch 1", [str(p.longest or "none") for p in plans]),
        ("host memory to load", [show_bytes(p.loading_peak) for p in plans]),
        ("padding and copies", [f"{100 * p.waste:.1f} %" for p in plans]),
    ]
    names = max(len(name) for name, _ in rows)
    widths = [max(len(values[i]) for _, values in rows) for i in range(len(plans))]
    lines = [
        f"{config.family}, {dtype}{weights}, batch {load.batch} x {load.length} tokens, {show_bytes(memory)} a GPU",
        "",
    ]
    for name, values in rows:
        lines.append(f"{name:<{names}}  " + "  ".join(v.rjust(w) for v, w in zip(values, widths, strict=True)))
    commands = [text for plan in plans if (text := command(plan, options)) is not None]
    return "\n".join([*lines, *([""] if commands else []), *commands]) + "\n"
