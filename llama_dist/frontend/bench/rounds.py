"""Measuring an open session in rounds. Every rank calls these alike and gets the same limits; rank 0's times count."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator
from pathlib import Path

from llama_dist.engine.plan import model_bytes, rank_weight_bytes, units_of
from llama_dist.engine.session import Session
from llama_dist.frontend.bench import limits as probes
from llama_dist.frontend.bench.cost import Model, model_of
from llama_dist.frontend.bench.device_profile import profile_device
from llama_dist.frontend.bench.figures import Key, Sizes, best, figures_of
from llama_dist.frontend.bench.in_turn import STEPS as STEPS_IN_TURN
from llama_dist.frontend.bench.in_turn import share_of_memory
from llama_dist.frontend.bench.machine import about, peak_device, peak_host, since_start
from llama_dist.frontend.bench.results import Results
from llama_dist.frontend.bench.step_profile import REDUCTIONS, timed
from llama_dist.frontend.bench.work import (
    MIXED_NEW,
    MIXED_PROMPTS,
    PREFILL,
    PROMPT,
    SAMPLED,
    STEPS,
    WARM,
    Player,
    mixed_lengths,
)
from llama_dist.frontend.numbers import show_number
from llama_dist.frontend.options import BenchOptions
from llama_dist.parallel.control import collect
from llama_dist.request import SamplingParams

log = logging.getLogger("llama_dist")
PROFILED = 16  # steps


class Rounds:
    """What was measured so far, by rounds; `contexts`: see Sizes."""

    def __init__(self, player: Player, chosen: tuple[str, ...]) -> None:
        self._player = player
        self.measured: dict[Key, list[float]] = {}
        self.contexts: dict[int, float] = {}
        self.left_out: list[tuple[str, str]] = []
        self._played = 0
        self._jobs = [*self._find(chosen)]

    def _find(self, chosen: tuple[str, ...]) -> Iterator[tuple[Key, Callable[[], float]]]:
        """The jobs there is room for."""
        player = self._player
        for batch in STEPS if "decode" in chosen else ():
            if self._fits(f"decode, batch {batch}", batch, PROMPT + STEPS[batch] + WARM + batch):
                yield ("decode", batch), functools.partial(self._decode, batch, 0.0)
        for batch in SAMPLED if "sampled" in chosen else ():
            if self._fits(f"decode, batch {batch}, sampled", batch, PROMPT + STEPS[batch] + WARM + batch):
                yield ("sampled", batch), functools.partial(self._decode, batch, SamplingParams.temperature)
        for n in PREFILL if "prefill" in chosen else ():
            if self._fits(f"prefill of {n:,} tokens", 1, n):
                yield ("prefill", n), functools.partial(player.prefill, n)
        if "batch" in chosen and self._fits("mixed batch", 1, max(MIXED_PROMPTS) + MIXED_NEW):
            yield ("batch", 0), player.mixed
        if "reproducible" in chosen:
            for batch in (min(STEPS), max(STEPS)):
                if self._fits(f"both kinds of sums, batch {batch}", batch, PROMPT + STEPS[batch] + WARM + batch):
                    yield ("reproducible decode", batch), functools.partial(self._share, player.decode_rate, batch)
            n = min(PREFILL)
            if self._fits(f"both kinds of sums, prefill of {n:,} tokens", 1, n):
                yield ("reproducible prefill", n), functools.partial(self._share, player.prefill, n)

    def _fits(self, what: str, sequences: int, length: int) -> bool:
        why = self._player.no_room(sequences, length)
        if why is not None:
            self.left_out.append((what, why))
        return why is None

    def _decode(self, batch: int, temperature: float) -> float:
        rate, self.contexts[batch] = self._player.decode(batch, temperature=temperature)
        return rate

    def _share(self, work: Callable[[int], float], size: int) -> float:
        """The rate with reproducible sums over that with ordinary ones; which come first changes by the round."""
        model, rates = self._player.session.engine.model, {}
        usual, first = model.reproducible, bool(self._played % 2)
        try:
            for reproducible in (first, not first):
                model.take_sums(reproducible)
                rates[reproducible] = work(size)
        finally:
            model.take_sums(usual)
        return rates[True] / rates[False]

    def play(self) -> None:
        """One round."""
        self._played += 1
        for key, job in self._jobs:
            log.info("measuring %s %s", key[0], key[1] or "")
            self.measured.setdefault(key, []).append(job())


def held_bytes(session: Session) -> int:
    """Bytes of weights on each rank."""
    config, size, run = session.config, session.world.mp_size, session.run
    itemsize = session.engine.model.norm.weight.itemsize
    return max(rank_weight_bytes(config, units_of(config, size, run.units), size, itemsize, run.quantization))


def session_model(session: Session) -> Model:
    """What the session's work costs."""
    return model_of(session.config, session.engine.model.norm.weight.itemsize, session.run.quantization)


def show_count(n: int) -> str:
    """1.24 B, 135 M, 148 k."""
    size, unit = next(((size, unit) for size, unit in ((1e9, "B"), (1e6, "M")) if n >= size), (1e3, "k"))
    return f"{show_number(n / size)} {unit}"


def type_of(session: Session) -> str:
    """In which type the session computes, and how its weights are packed."""
    packed = f" with {session.run.quantization} weights" if session.run.quantization else ""
    return str(session.engine.model.norm.weight.dtype).removeprefix("torch.") + packed


def measure(player: Player, options: BenchOptions) -> Results:
    """Everything, in order: start-up first, memory after the first round, limits in every round."""
    session = player.session
    world, config, engine = session.world, session.config, session.engine
    ready = since_start()
    player.first_token()
    start: dict[Key, list[float]] = {("ready", 0): [ready], ("first token", 0): [since_start()]}
    weight = engine.model.norm.weight
    model = session_model(session)
    rounds, readings, most = Rounds(player, options.work), [], {}
    in_turn = "decode" in options.work and player.no_room(1, PROMPT + WARM + STEPS_IN_TURN + 1) is None
    for number in range(options.repeats):
        log.info("round %d of %d", number + 1, options.repeats)
        rounds.play()
        if number == 0:
            most = peaks(session)
        memory = probes.memory_to_read(world)
        read = probes.best_read(world, memory)
        if in_turn:
            rounds.measured.setdefault(("decode of memory", 1), []).append(share_of_memory(player, model, memory))
        del memory
        readings.append(probes.measure(world, config, weight.dtype, read))
    profiles, reductions = profile(player) if "decode" in options.work else ({}, None)
    measured = {**rounds.measured, **start, **most}
    if reductions is not None:
        measured["reductions", 0] = [reductions]
    found = best(readings)
    sizes = Sizes(rounds.contexts, mixed_lengths(), MIXED_NEW, 1 + 2 * config.n_layers, held_bytes(session))
    name = f"{Path(session.run.ckpt_dir).name}{', random weights' if options.shape else ''}"
    size = f"{show_count(model_bytes(config, 1))} parameters"
    return Results(
        about(f"{name}, {config.family}, {size}", type_of(session), world),
        figures_of(measured, model, found, sizes),
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
        shares[batch], seconds = _profile_steps(player)
        player.drop()
        if batch == 1 and player.session.world.mp_size > 1:
            reductions = seconds / PROFILED
    return shares, reductions


def _profile_steps(player: Player) -> tuple[dict[str, float], float]:
    if player.session.world.device.type == "cuda":
        return profile_device(lambda: player.steps(PROFILED))
    engine = player.session.engine
    with timed(engine.model) as clock:
        before = engine.ahead
        player.steps(PROFILED)
        passes = PROFILED - before + engine.ahead
    whole = sum(clock.seconds.values())
    shares = {label: seconds / whole for label, seconds in clock.seconds.items()}
    return shares, clock.seconds.get(REDUCTIONS, 0.0) * PROFILED / max(1, passes)
