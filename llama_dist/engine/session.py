"""From a RunConfig to an engine that answers: check everything, join the ranks, load, agree."""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from llama_dist import __version__
from llama_dist.checkpoint.gguf_header import read_metadata
from llama_dist.checkpoint.load import load
from llama_dist.checkpoint.open import open_checkpoint
from llama_dist.checkpoint.reader import Reader
from llama_dist.config import ModelConfig, RunConfig
from llama_dist.engine.calls import MOST_PASSES, Calls
from llama_dist.engine.engine import Engine, OnToken
from llama_dist.engine.memory import count_pages
from llama_dist.engine.numerics import find_unsteady, numeric_mode
from llama_dist.engine.pages import PageTable
from llama_dist.engine.plan import model_bytes
from llama_dist.engine.scheduler import Scheduler
from llama_dist.errors import ConfigError, Halted
from llama_dist.kernels.quantized import compiled
from llama_dist.kernels.triton_here import serves
from llama_dist.model.cache import PAGE_SIZE
from llama_dist.model.room import move_together
from llama_dist.model.transformer import Transformer
from llama_dist.parallel.claims import meet
from llama_dist.parallel.control import agree, collect
from llama_dist.parallel.launch import read_launch
from llama_dist.parallel.layers import Part
from llama_dist.parallel.units import cut_model, units_for
from llama_dist.parallel.world import World, join, model_parallel_size, pick_device
from llama_dist.quant.product import panels
from llama_dist.quant.scheme import QUANTIZATIONS, Quantization
from llama_dist.request import Completion, Request
from llama_dist.text.base import Tokenizer
from llama_dist.text.load import find_tokenizer, load_tokenizer, tokenizer_from_gguf

log = logging.getLogger("llama_dist")
DEFAULT_SEQ_LEN = 4096  # of a run that names none; longer needs --max_seq_len, for the memory it takes


@dataclass(frozen=True)
class Checked:
    """What is known from headers alone, before any rank is met: everything that can be refused has been."""

    reader: Reader
    tokenizer: Tokenizer
    max_seq_len: int
    dtype: torch.dtype
    reproducible: bool


@dataclass(frozen=True)
class Session:
    """A loaded model among its ranks. `engine` serves this rank's replica; `complete` deals over all of them."""

    run: RunConfig
    world: World
    config: ModelConfig
    tokenizer: Tokenizer
    engine: Engine
    max_seq_len: int


def read_tokenizer(run: RunConfig, reader: Reader) -> Tokenizer:
    """`--tokenizer_path` (a GGUF too) if given, else what lies in the checkpoint directory, else a GGUF's own."""
    if run.tokenizer_path is not None:
        metadata = read_metadata(Path(run.tokenizer_path))
        return load_tokenizer(run.tokenizer_path) if metadata is None else tokenizer_from_gguf(metadata)
    directory = Path(run.ckpt_dir)
    found = find_tokenizer(directory) if directory.is_dir() else None
    if found is None and reader.metadata:
        return tokenizer_from_gguf(reader.metadata)
    return load_tokenizer(directory)


def pick_dtype(run: RunConfig, reader: Reader, device: torch.device) -> torch.dtype:
    """`auto`: the checkpoint's own type, and bfloat16 for quantised weights; but on a CPU float32 for all but bfloat16.

    A CPU is slow at float16, and decoded weights are not exact in bfloat16: a near tie then goes the wrong way.
    """
    if run.dtype != "auto":
        dtype = getattr(torch, run.dtype)
        assert isinstance(dtype, torch.dtype)
        return dtype
    info = reader.tensors["layers.0.attention.wq.weight"]
    quantised = info.file_bytes < 2 * info.shape[0] * info.shape[1]
    if device.type == "cpu":
        return torch.bfloat16 if info.dtype == torch.bfloat16 and not quantised else torch.float32
    return torch.bfloat16 if quantised else info.dtype


def check_run(run: RunConfig, reader: Reader | None = None, tokenizer: Tokenizer | None = None) -> Checked:
    """Everything that headers and flags can tell. Raises ConfigError or CheckpointError; touches no other rank.

    `reader` and `tokenizer`: in place of what lies at `ckpt_dir`.
    """
    launch = read_launch()
    mp_size = model_parallel_size(run, launch)
    if run.units is not None and run.units < mp_size:
        raise ConfigError(f"--units {run.units} is less than {mp_size} model-parallel ranks; use {mp_size} or more")
    device = pick_device(run, launch)
    reader = reader or open_checkpoint(run.ckpt_dir)
    tokenizer = tokenizer or read_tokenizer(run, reader)
    config = reader.config
    if tokenizer.n_words > config.vocab_size:
        raise ConfigError(
            f"the tokenizer has {tokenizer.n_words} words, the checkpoint {config.vocab_size}; "
            "pass the --tokenizer_path that belongs to it"
        )
    if run.max_seq_len is not None and run.max_seq_len > config.max_position:
        log.warning("--max_seq_len %d is beyond the %d the model was made for", run.max_seq_len, config.max_position)
    max_seq_len = run.max_seq_len or min(config.max_position, DEFAULT_SEQ_LEN)
    dtype = pick_dtype(run, reader, device)
    reproducible = panels(dtype, device) is not None if run.reproducible is None else run.reproducible
    return Checked(reader, tokenizer, max_seq_len, dtype, reproducible)


def mode_of(run: RunConfig, checked: Checked) -> str | None:
    """The numeric mode of a reproducible run; None for others, which promise none."""
    if not checked.reproducible:
        return None
    launch = read_launch()
    n_units = units_for(model_parallel_size(run, launch), run.units)
    return numeric_mode(checked.dtype, run.quantization, pick_device(run, launch), n_units)


def _identity(run: RunConfig, checked: Checked) -> dict[str, object]:
    """What must be alike on every rank for the ranks to compute the same."""
    shared = {k: v for k, v in asdict(run).items() if k not in ("ckpt_dir", "tokenizer_path", "verbose")}
    reader = checked.reader
    tensors = json.dumps({name: (info.shape, str(info.dtype)) for name, info in reader.tensors.items()})
    digest = hashlib.blake2b((tensors + repr(reader.config)).encode(), digest_size=8).hexdigest()
    words = checked.tokenizer.n_words
    shared["numeric mode"] = mode_of(run, checked)
    return {**shared, "checkpoint": digest, "words": words, "llama_dist": __version__, "torch": torch.__version__}


@torch.inference_mode(False)  # what is made here outlives a mode that the caller may be in
def open_session(run: RunConfig, checked: Checked | None = None, halted: Callable[[], bool] = lambda: False) -> Session:
    """Join the ranks and load this one's part of the model. Every rank calls it alike.

    Raises Halted on all ranks where `halted` said on one, while it loaded, that it is time to leave.
    """
    checked = checked or check_run(run)
    reader, config = checked.reader, checked.reader.config
    world = join(run)
    agree(world, _identity(run, checked), "their flags, checkpoint or versions")
    units = cut_model(
        config.n_heads, config.n_kv_heads, config.hidden_dim, config.vocab_size, units_for(world.mp_size, run.units)
    )
    began = time.monotonic()
    packing = QUANTIZATIONS[run.quantization] if run.quantization else None
    part = Part(world.mp_rank, world.mp_size, checked.dtype, world.device, checked.reproducible, packing)
    model = Transformer(config, units, part)
    move_together(model)
    load(model, reader, progress=world.rank == 0, halted=halted)
    reader.close()
    log.info(
        "%s: %s, %s%s on %d x %s, %d replica%s, loaded in %.1f s",
        Path(run.ckpt_dir).name,
        config.family,
        str(checked.dtype).removeprefix("torch."),
        f" with {run.quantization} weights" if run.quantization else "",
        world.mp_size,
        world.device.type,
        world.n_replicas,
        "" if world.n_replicas == 1 else "s",
        time.monotonic() - began,
    )
    if packing is not None and not (compiled(model.norm.weight) or serves(model.norm.weight)):
        log.info("no kernel multiplies packed weights here: they are unpacked for every product, which is slow")
    meet(world, "loaded")  # the others' memory is counted when all have taken what they need
    if any(collect(world, halted())):
        raise Halted("told to stop while the model was loaded; run it again")
    if checked.reproducible:
        refuse_unsteady(model, world)
    n_pages = count_pages(run, world, model, checked.max_seq_len)
    # With dynamic scaling a prompt's keys depend on how long the prompt is: another prompt's pages do not serve.
    scheduler = Scheduler(
        PageTable(n_pages, PAGE_SIZE),
        run.max_batch_size,
        run.tick_tokens(world.device.type),
        checked.max_seq_len,
        run.prefix_caching and not model.rope.dynamic,
    )
    cache = model.new_cache(n_pages)
    model.lay_out(cache, checked.max_seq_len)
    engine = Engine(
        model,
        cache,
        world,
        scheduler,
        checked.tokenizer,
        checked.tokenizer.stop_ids | frozenset(config.eos_ids),
        run.seed,
        run.check_every,
        foresees=world.device.type == "cuda",
        calls=calls_of(config, checked.dtype, packing),
    )
    return Session(run, world, config, checked.tokenizer, engine, checked.max_seq_len)


def calls_of(config: ModelConfig, dtype: torch.dtype, packing: Quantization | None) -> Calls:
    """What passes of this model read at most, all its ranks together."""
    bits = packing.output.bits if packing else 8 * dtype.itemsize
    keys = 2 * config.n_layers * config.n_kv_heads * config.head_dim * dtype.itemsize
    return Calls(MOST_PASSES, model_bytes(config, 1) * bits // 8, keys)


def refuse_unsteady(model: Transformer, world: World) -> None:
    """ConfigError on all ranks where one of them cannot keep the promise of a reproducible run."""
    began = time.monotonic()
    found = collect(world, find_unsteady(model))
    for rank, what in enumerate(found):
        if what is not None:
            raise ConfigError(
                f"--reproducible cannot be kept on rank {rank}: {what} gives a row other bits beside other rows there; "
                f"install {'Triton' if world.device.type == 'cuda' else 'g++'} for the project's own kernels, "
                "or go without the promise: --noreproducible"
            )
    log.info("reproducible: rows keep their bits here (checked in %.2f s)", time.monotonic() - began)


def complete(session: Session, requests: Sequence[Request], on_token: OnToken | None = None) -> list[Completion]:
    """Serve `requests`, dealt in turn over the replicas; all completions in order, on every rank.

    Every rank calls it with the same requests, whose ids are unique. `on_token` hears of replica 0's tokens, on its
    ranks. Raises RequestError before anything is computed, DesyncError where the ranks' requests differ.
    """
    world, engine = session.world, session.engine
    for request in requests:
        engine.validate(request)
    text = json.dumps([request.to_json() for request in requests])
    agree(world, hashlib.blake2b(text.encode(), digest_size=8).hexdigest(), "the requests they were given")
    mine = requests[world.replica :: world.n_replicas]
    for request in mine:
        engine.add(request)
    done: dict[str, Completion] = {}
    while not engine.idle:
        done.update((c.request_id, c) for c in engine.step(on_token if world.replica == 0 else None))
    completions = [done[request.id] for request in mine]
    if world.n_replicas == 1:
        return completions
    meet(world, "completed")
    # One rank of each replica tells; the others' answers are the same.
    told = collect(world, [c.to_json() for c in completions] if world.mp_rank == 0 else [])
    by_id = {c["request_id"]: Completion.from_json(c) for part in told for c in part}
    return [by_id[request.id] for request in requests]
