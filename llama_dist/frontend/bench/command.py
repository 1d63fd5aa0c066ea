"""The `bench` command, from the checked flags to the table. Every rank does the same work; rank 0 tells of it."""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llama_dist.checkpoint.synthetic import RandomReader
from llama_dist.config import RunConfig
from llama_dist.engine.plan import model_bytes, rank_weight_bytes, units_of
from llama_dist.engine.session import Checked, Session, check_run, open_session
from llama_dist.errors import ConfigError
from llama_dist.frontend.bench import limits as probes
from llama_dist.frontend.bench.cost import model_of
from llama_dist.frontend.bench.figures import Figure, Key, Limits, Sizes, best, figures_of
from llama_dist.frontend.bench.machine import About, about, as_json, peak_device, peak_host, since_start
from llama_dist.frontend.bench.step_profile import REDUCTIONS, timed
from llama_dist.frontend.bench.table import figures_text, limits_text, profile_text
from llama_dist.frontend.bench.work import MIXED_NEW, MIXED_PROMPTS, PREFILL, PROMPT, STEPS, WARM, Player, mixed_lengths
from llama_dist.frontend.options import BenchOptions
from llama_dist.frontend.output import Output
from llama_dist.model.shapes import SHAPES
from llama_dist.parallel.control import collect
from llama_dist.parallel.launch import read_launch
from llama_dist.parallel.world import leave, pick_device
from llama_dist.text.ids import ids_tokenizer

log = logging.getLogger("llama_dist")
VERSION = 1  # of the JSON
PROFILED = 16  # steps


@dataclasses.dataclass(frozen=True)
class Results:
    """All of a run. `left_out`: (what, why). `profiles`: by batch, shares of a step by what they went to."""

    about: About
    figures: list[Figure]
    limits: Limits
    left_out: list[tuple[str, str]]
    profiles: dict[int, dict[str, float]]

    def to_json(self) -> dict[str, Any]:
        return {
            "version": VERSION,
            "about": as_json(self.about),
            "figures": [figure.to_json() for figure in self.figures],
            "limits": {
                "read": {"value": self.limits.read, "unit": "bytes/s", "how": self.limits.how["read"]},
                "product": {"value": self.limits.product, "unit": "FLOP/s", "how": self.limits.how["product"]},
                "reduction": {"value": self.limits.reduction, "unit": "s", "how": "one after another"},
            },
            "left_out": [{"what": what, "why": why} for what, why in self.left_out],
            "profiles": {str(batch): shares for batch, shares in self.profiles.items()},
        }

    def text(self) -> str:
        lines = [*self.about.lines(), "", *figures_text(self.figures), "", *limits_text(self.limits)]
        if self.profiles:
            lines += ["", *profile_text(self.profiles)]
        if self.left_out:
            lines += ["", *(f"left out: {what}: {why}" for what, why in self.left_out)]
        return "\n".join(lines) + "\n"


def prepare(options: BenchOptions) -> Callable[[], int]:
    """Check flags, files to write and the checkpoint; the work comes back."""
    for name in ("json", "plot"):
        path = getattr(options, name)
        if path is not None and (Path(path).is_dir() or not Path(path).absolute().parent.is_dir()):
            raise ConfigError(f"--{name} {path} cannot be written; name a file in a directory that exists")
    run = dataclasses.replace(options.run, max_batch_size=max(STEPS))
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
        longest = min(checked.reader.config.max_position, max(PREFILL) + 1)
        checked = dataclasses.replace(checked, max_seq_len=longest)
    return checked


def work(options: BenchOptions, run: RunConfig, checked: Checked) -> int:
    """Load, measure, tell. Every rank calls it alike."""
    session = open_session(run, checked)
    results = measure(session, options)
    output = Output()
    if session.world.rank == 0:
        output.write(results.text())
        if options.json is not None:
            Path(options.json).write_text(json.dumps(results.to_json(), indent=1) + "\n")
    leave(session.world)
    return output.exit_code


class Rounds:
    """What was measured so far, by rounds; `contexts`: see Sizes."""

    def __init__(self, player: Player, chosen: tuple[str, ...]) -> None:
        self._player = player
        self.measured: dict[Key, list[float]] = {}
        self.contexts: dict[int, float] = {}
        self.left_out: list[tuple[str, str]] = []
        self._jobs = [*self._find(chosen)]

    def _find(self, chosen: tuple[str, ...]) -> Any:
        """The jobs there is room for."""
        player = self._player
        for batch in STEPS if "decode" in chosen else ():
            if self._fits(f"decode, batch {batch}", batch, PROMPT + STEPS[batch] + WARM + batch):
                yield ("decode", batch), functools.partial(self._decode, batch)
        for n in PREFILL if "prefill" in chosen else ():
            if self._fits(f"prefill of {n:,} tokens", 1, n):
                yield ("prefill", n), functools.partial(player.prefill, n)
        if "batch" in chosen and self._fits("mixed batch", 1, max(MIXED_PROMPTS) + MIXED_NEW):
            yield ("batch", 0), player.mixed

    def _fits(self, what: str, sequences: int, length: int) -> bool:
        why = self._player.no_room(sequences, length)
        if why is not None:
            self.left_out.append((what, why))
        return why is None

    def _decode(self, batch: int) -> float:
        rate, self.contexts[batch] = self._player.decode(batch)
        return rate

    def play(self) -> None:
        """One round."""
        for key, job in self._jobs:
            log.info("measuring %s %s", key[0], key[1] or "")
            self.measured.setdefault(key, []).append(job())


def measure(session: Session, options: BenchOptions) -> Results:
    """Everything, in order: start-up first, memory after the first round, limits in every round."""
    world, config, engine = session.world, session.config, session.engine
    ready = since_start()
    player = Player(session)
    player.first_token()
    start: dict[Key, list[float]] = {("ready", 0): [ready], ("first token", 0): [since_start()]}
    weight = engine.model.norm.weight
    rounds, readings, memory = Rounds(player, options.work), [], {}
    for number in range(options.repeats):
        log.info("round %d of %d", number + 1, options.repeats)
        rounds.play()
        if number == 0:
            memory = peaks(session)
        readings.append(probes.measure(world, config, weight.dtype))
    profiles, reductions = profile(player) if "decode" in options.work else ({}, None)
    measured = {**rounds.measured, **start, **memory}
    if reductions is not None:
        measured["reductions", 0] = [reductions]
    held = sum(p.nbytes for p in engine.model.parameters())
    units = units_of(config, world.mp_size, session.run.units)
    entry = weight.itemsize * held / rank_weight_bytes(config, units, world.mp_size, weight.itemsize)[world.mp_rank]
    found = best(readings)
    sizes = Sizes(rounds.contexts, mixed_lengths(), MIXED_NEW, 1 + 2 * config.n_layers, held)
    name = f"{Path(session.run.ckpt_dir).name}{', random weights' if options.shape else ''}"
    size = f"{model_bytes(config, 1) / 1e9:.3g} B parameters"
    return Results(
        about(f"{name}, {config.family}, {size}", weight.dtype, world),
        figures_of(measured, model_of(config, entry, weight.itemsize), found, sizes),
        found,
        rounds.left_out,
        profiles,
    )


def peaks(session: Session) -> dict[Key, list[float]]:
    """The most memory that any rank has taken so far."""
    world = session.world
    found: dict[Key, list[float]] = {("host memory", 0): [float(max(collect(world, peak_host())))]}
    device = peak_device(world.device)
    if device is not None:
        found["device memory", 0] = [float(max(collect(world, device)))]
    return found


def profile(player: Player) -> tuple[dict[int, dict[str, float]], float | None]:
    """Shares of a decode step by batch, and the seconds of its reductions at batch 1 where there are other ranks."""
    shares: dict[int, dict[str, float]] = {}
    reductions = None
    for batch in (min(STEPS), max(STEPS)):
        if player.no_room(batch, PROMPT + WARM + PROFILED + batch) is not None:
            continue
        player.decoding(batch)
        with timed() as clock:
            player.steps(PROFILED)
        player.drop()
        whole = sum(clock.seconds.values())
        shares[batch] = {label: seconds / whole for label, seconds in clock.seconds.items()}
        if batch == 1 and player.session.world.mp_size > 1:
            reductions = clock.seconds[REDUCTIONS] / PROFILED
    return shares, reductions
