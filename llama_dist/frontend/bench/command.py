"""The `bench` command, from the checked flags to the table. Every rank does the same work; rank 0 tells of it."""

from __future__ import annotations

import dataclasses
import functools
import gc
import importlib.util
import json
from collections.abc import Callable
from pathlib import Path

import torch

from llama_dist.checkpoint.synthetic import RandomReader
from llama_dist.config import RunConfig
from llama_dist.engine.session import Checked, check_run, open_session
from llama_dist.errors import ConfigError, LlamaDistError
from llama_dist.frontend.bench.against import compare, pythons
from llama_dist.frontend.bench.results import Results
from llama_dist.frontend.bench.rounds import measure, session_model
from llama_dist.frontend.bench.scale import (
    BATCHES,
    CONTEXTS,
    batch_series,
    context_series,
    most_ranks,
    ranks_series,
    rows_series,
)
from llama_dist.frontend.bench.scaling import medians
from llama_dist.frontend.bench.table import text_of
from llama_dist.frontend.bench.work import PREFILL, STEPS, Player
from llama_dist.frontend.options import BenchOptions
from llama_dist.frontend.output import Output
from llama_dist.model.shapes import SHAPES
from llama_dist.parallel.launch import read_launch
from llama_dist.parallel.world import leave, pick_device
from llama_dist.text.ids import ids_tokenizer

ROOM = 64  # tokens beyond the longest prompt


def prepare(options: BenchOptions) -> Callable[[], int]:
    """Check flags, files to write and the checkpoint; the work comes back."""
    if options.against and read_launch().size > 1:
        raise ConfigError("--against starts fresh processes in turn; run it as one process, no launcher")
    if options.plot is not None and importlib.util.find_spec("matplotlib") is None:
        raise ConfigError("--plot needs matplotlib, which is not installed; run: pip install 'llama_dist[report]'")
    for name in ("json", "plot"):
        path = getattr(options, name)
        if path is not None and (Path(path).is_dir() or not Path(path).absolute().parent.is_dir()):
            raise ConfigError(f"--{name} {path} cannot be written; name a file in a directory that exists")
    pythons(options)
    run = dataclasses.replace(options.run, max_batch_size=max(BATCHES if options.scale else STEPS))
    checked = check(run, options)
    return functools.partial(work, options, run, checked)


def check(run: RunConfig, options: BenchOptions) -> Checked:
    """`check_run`, with random weights where a shape is named, and sequences as long as the work needs."""
    if options.shape is None:
        checked = check_run(run)
    else:
        config = SHAPES[options.shape]
        reader = RandomReader(config, run.seed, pick_device(run, read_launch()))
        checked = check_run(run, reader, ids_tokenizer(config.vocab_size))
    if run.max_seq_len is None:
        longest = ROOM + max(CONTEXTS if options.scale else PREFILL)
        checked = dataclasses.replace(checked, max_seq_len=min(checked.reader.config.max_position, longest))
    return checked


def work(options: BenchOptions, run: RunConfig, checked: Checked) -> int:
    """Load, measure, tell. Every rank calls it alike."""
    if options.against:
        return tell(compare(options, checked), options)
    session = open_session(run, checked)
    world = session.world
    player = Player(session)
    results = measure(player, options)
    if options.scale:
        model = session_model(session)
        rounds = [(batch_series(player), *context_series(player, model)) for _ in range(options.repeats)]
        series = [*map(medians, zip(*rounds, strict=True)), rows_series(player)]
        results = dataclasses.replace(results, series=series)
    rank, size, device = world.rank, world.size, world.device
    leave(world)
    if options.scale and size == 1:
        del player, session  # the memory is for those to come
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
        results = dataclasses.replace(results, series=[*results.series, *ranks_series(options, most_ranks(device))])
    return tell(results, options) if rank == 0 else 0


def tell(results: Results, options: BenchOptions) -> int:
    """Write the table, and the files that were asked for; the exit code."""
    output = Output()
    output.write(text_of(results))
    try:
        if options.json is not None:
            Path(options.json).write_text(json.dumps(results.to_json(), indent=1) + "\n")
        if options.plot is not None:
            from llama_dist.frontend.bench.plot import draw

            draw(results, Path(options.plot))
    except OSError as err:
        raise LlamaDistError(f"cannot write {err.filename}: {err.strerror}; the table stands") from None
    return output.exit_code
