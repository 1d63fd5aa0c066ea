"""`bench` without a model: costs and limits from planted numbers, how steep a series is, runs made one, the clock."""

from __future__ import annotations

import dataclasses
import itertools
import json
import re
from types import SimpleNamespace
from typing import cast

import pytest
import torch

from llama_dist.engine.plan import model_bytes
from llama_dist.frontend.bench import device_profile, in_turn, step_profile
from llama_dist.frontend.bench.cost import Model, job_cost, least_seconds, model_of, prefill_cost, step_cost
from llama_dist.frontend.bench.figures import BYTES, RATE, Figure, Limits, Sizes, best, figures_of
from llama_dist.frontend.bench.machine import About
from llama_dist.frontend.bench.results import Contender, Results, merged
from llama_dist.frontend.bench.scaling import Point, Series, exponent, medians
from llama_dist.frontend.bench.table import text_of
from llama_dist.frontend.bench.work import Player
from llama_dist.kernels import program
from llama_dist.model.shapes import SHAPES

PUBLISHED = {
    "smollm2-135m": 134_515_008,
    "tinyllama-1.1b": 1_100_048_384,
    "llama-2-7b": 6_738_415_616,
    "llama-3-8b": 8_030_261_248,
    "llama-3-70b": 70_553_706_496,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824,
}
ABOUT = About("m", "bfloat16", "cpu", "p", 2, 2, 1, 1, "2.13", "0.1", "2026-01-01", "bench")
LIMITS = Limits(100e9, 1e12, None, {"read": "a", "product": "b"})
# 10 GB of weights; a token's products are 20 GFLOP, its logits 1, a pair 1 MFLOP, its keys and values 1 MB.
MODEL = Model(weights=10e9, kv=1e6, products=20e9, head=1e9, pair=1e6)
SIZES = Sizes({1: 100.0, 64: 100.0}, [10, 20], 4, 61, 10**9)


@pytest.mark.parametrize("name", sorted(SHAPES))
def test_a_shape_has_as_many_parameters_as_its_model_card_says(name: str) -> None:
    assert SHAPES.keys() == {*PUBLISHED, "tiny"}
    assert name == "tiny" or model_bytes(SHAPES[name], 1) == PUBLISHED[name]


def test_what_smollm2_costs_by_hand() -> None:
    model = model_of(SHAPES["smollm2-135m"], 2)
    layer = 2 * 576 * 576 + 2 * 576 * 192 + 3 * 576 * 1536 + 2 * 576
    assert model.products == 2 * (30 * layer + 576)
    assert model.head == 2 * 49152 * 576
    assert model.weights == 2 * 134_515_008  # the embedding is the output matrix: a step reads it whole
    assert model.kv == 2 * 30 * 192 * 2
    assert model.pair == 4 * 30 * 576
    assert step_cost(model, 3, 100).bytes == model.weights + 300 * model.kv
    assert step_cost(model, 3, 100).flops == 3 * (model.products + model.head + 100 * model.pair)


def test_an_embedding_of_its_own_is_not_read() -> None:
    shape = SHAPES["llama-3-8b"]
    assert model_of(shape, 2).weights == 2 * (PUBLISHED["llama-3-8b"] - 128256 * 4096)
    packed = model_of(SHAPES["llama-3.2-1b"], 2, "int8")
    assert 0.5 < packed.weights / model_of(SHAPES["llama-3.2-1b"], 2).weights < 0.6
    assert packed.products == model_of(SHAPES["llama-3.2-1b"], 2).products


def test_a_prompt_costs_what_its_tokens_cost_one_by_one() -> None:
    n = 7
    one_by_one = sum(MODEL.products + MODEL.pair * (i + 1) for i in range(n)) + MODEL.head
    assert prefill_cost(MODEL, n).flops == pytest.approx(one_by_one)


def test_a_batch_costs_its_prompts_and_every_new_token() -> None:
    cost = job_cost(MODEL, [5], 3)
    steps = [step_cost(MODEL, 1, context) for context in (6, 7)]
    assert cost.flops == pytest.approx(prefill_cost(MODEL, 5).flops + sum(step.flops for step in steps))
    assert cost.bytes == pytest.approx(prefill_cost(MODEL, 5).bytes + sum(step.bytes for step in steps))


def test_the_slower_of_memory_and_products_is_the_limit() -> None:
    assert least_seconds(step_cost(MODEL, 1, 0), 1e12, 100e9) == (0.1, "memory")
    seconds, bound = least_seconds(step_cost(MODEL, 64, 0), 1e12, 100e9)
    assert (seconds, bound) == (pytest.approx(64 * 0.021), "product")


def test_planted_timings_give_the_shares_they_should() -> None:
    measured = {
        ("decode", 1): [5.0, 4.0, 6.0],
        ("decode", 64): [20.0],
        ("prefill", 1000): [40.0],
        ("ready", 0): [3.0],
        ("reductions", 0): [61e-5],
        ("host memory", 0): [2e9],
        ("device memory", 0): [4e9],
    }
    limits = dataclasses.replace(LIMITS, reduction=5e-6)
    found = {(f.name, f.size): f for f in figures_of(measured, MODEL, limits, SIZES)}
    one = found["decode", 1]
    # 10 GB and 100 MB of keys and values at 100 GB/s
    assert (one.limit, one.bound, one.median) == (pytest.approx(1 / 0.101), "memory", 5.0)
    assert one.share == pytest.approx(5 * 0.101)
    many = found["decode", 64]
    assert (many.limit, many.bound) == (pytest.approx(1 / 0.0211), "product")
    assert found["prefill", 1000].limit == pytest.approx(1000 / (20 + 0.001 + 0.5005))
    assert found["ready", 0].limit is None and found["ready", 0].share is None
    assert found["reductions", 0].share == pytest.approx(0.5)
    assert found["device memory", 0].share == pytest.approx(0.25)
    assert [found[key].unit for key in (("decode", 1), ("ready", 0), ("host memory", 0))] == [RATE, "s", BYTES]


def test_a_step_is_held_against_memory_as_it_was_then(monkeypatch: pytest.MonkeyPatch) -> None:
    turns, lengths = in_turn.TURNS, []
    # Memory is half as fast in the second half, and so are the steps: they have four fifths of it all along.
    rates = iter([100e9] * (turns // 2) + [75e9] + [50e9] * (turns // 2))

    class Planted:
        def __init__(self) -> None:
            self.tokens = [0] * 100
            scheduler = SimpleNamespace(running=[self])
            self.session = SimpleNamespace(
                world=SimpleNamespace(n_replicas=2), engine=SimpleNamespace(scheduler=scheduler)
            )

        def decoding(self, batch: int) -> None:
            assert batch == 1

        def steps(self, n: int) -> float:
            lengths.append(len(self.tokens))
            context = len(self.tokens) + (n - 1) / 2
            self.tokens += [0] * n
            fast = [100e9] * (turns // 2 - 1) + [87.5e9, 62.5e9] + [50e9] * (turns // 2 - 1)
            return 2 * n * step_cost(MODEL, 1, context).bytes / (0.8 * fast[len(lengths) - 1])

        def drop(self) -> None:
            self.tokens = []

    planted = Planted()
    monkeypatch.setattr(in_turn, "read_once", lambda world, memory: next(rates))
    share = in_turn.share_of_memory(cast(Player, planted), MODEL, torch.empty(0))
    assert share == pytest.approx(0.8)
    assert len(lengths) == turns and not planted.tokens and next(rates, None) is None


def test_the_best_of_all_readings_is_the_limit() -> None:
    worse = Limits(90e9, 2e12, 3e-6, {"read": "c", "product": "d"})
    assert best([LIMITS, worse]) == Limits(100e9, 2e12, 3e-6, {"read": "a", "product": "d"})


def test_runs_of_several_processes_are_one() -> None:
    def run(rate: float, limit: float, ready: float, read: float) -> Results:
        figures = [Figure("decode", 1, RATE, (rate,), limit, "memory"), Figure("ready", 0, "s", (ready,))]
        return Results(ABOUT, figures, dataclasses.replace(LIMITS, read=read), [], {1: {"products": 1.0}})

    found = merged([run(5.0, 10.0, 1.0, 100e9), run(7.0, 12.0, 2.0, 120e9), run(6.0, 11.0, 9.0, 110e9)])
    assert [figure.values for figure in found.figures] == [(5.0, 7.0, 6.0), (1.0, 2.0, 9.0)]
    assert (found.figures[0].share, found.figures[1].median) == (0.5, 2.0)
    assert found.limits.read == 120e9


def test_a_contender_is_compared_the_right_way_round() -> None:
    other = Contender("x", "x 1", {("decode", 1): [1.0, 2.0, 9.0], ("ready", 0): [30.0]})
    assert other.ratio(Figure("decode", 1, RATE, (8.0,))) == 4.0
    assert other.ratio(Figure("ready", 0, "s", (10.0,))) == 3.0
    assert other.ratio(Figure("decode", 8, RATE, (8.0,))) is None


def test_results_survive_their_json_and_are_all_shown() -> None:
    figures = [Figure("decode", 1, RATE, (5.0, 7.0), 10.0, "memory"), Figure("host memory", 0, BYTES, (2e9,))]
    series = [Series("decode", "sequences", RATE, tuple(Point(n, n, n**2, 1 / n) for n in (1, 2, 4, 8)), "the end")]
    found = Results(ABOUT, figures, LIMITS, [("prefill", "no room")], {1: {"products": 0.75}})
    assert Results.from_json(json.loads(json.dumps(found.to_json()))) == found
    whole = dataclasses.replace(found, contenders=[Contender("other", "v1", {("decode", 1): [2.0]})], series=series)
    text = text_of(whole)
    for part in ("5.00 .. 7.00", "60 %", "2.00 GB", "2.00 (3.00)", "other: v1", "75.0 %", "left out: prefill: no room"):
        assert part in text
    assert re.search(r"100\.0 GB/s \(a\)", text) and "FASTER THAN ITS WORK" in text and "the end" in text
    data = whole.to_json()
    assert data["contenders"][0]["figures"][0]["ratio"] == 3.0
    assert data["series"][0]["steep"] is True


@pytest.mark.parametrize("power", [0.5, 1.0, 1.5, 2.0])
def test_the_power_of_a_series_is_found(power: float) -> None:
    work = [10.0**n for n in range(5)]
    assert exponent(work, [3 * w**power for w in work]) == pytest.approx(power)


def test_a_quadratic_rise_behind_a_fixed_cost_is_flagged_and_a_line_is_not() -> None:
    def series(seconds: list[float]) -> Series:
        return Series("x", "lines", "lines/s", tuple(Point(10**n, 10**n, s, 1) for n, s in enumerate(seconds)))

    assert series([1 + 1e-6 * 10 ** (2 * n) for n in range(7)]).steep
    assert not series([1 + 1e-4 * 10**n for n in range(7)]).steep
    assert not series([1e-4 * 10**n * (1 + 0.1 * (-1) ** n) for n in range(7)]).steep  # noise
    assert series([1.0, 2.0]).exponent is None and not series([1.0, 2.0]).steep


def test_rounds_of_a_series_are_one_by_medians() -> None:
    def series(seconds: dict[int, float], note: str) -> Series:
        points = tuple(Point(n, 5 * n, s, n / s) for n, s in seconds.items())
        return Series("decode", "sequences", RATE, points, note)

    # One round met a slow minute, another was short of patience.
    rounds = [series({1: 1.0, 2: 9.0, 4: 4.0}, "end"), series({1: 8.0, 2: 2.0, 4: 5.0}, "end")]
    rounds.append(series({1: 2.0, 2: 2.5}, "patience"))
    assert medians(rounds) == series({1: 2.0, 2: 2.5, 4: 4.5}, "end")
    assert medians(rounds[:1]) == rounds[0]


def test_a_clock_belongs_to_one_function_at_a_time() -> None:
    now = 0.0

    def wait(seconds: float) -> None:
        nonlocal now
        now += seconds

    clock = step_profile.Clock(lambda: now)
    product = clock.around(lambda: wait(5), step_profile.PRODUCTS)
    gather = clock.around(lambda: wait(7), step_profile.REDUCTIONS)
    forward = clock.around(lambda: (wait(1), product(), wait(2), product()), step_profile.FORWARD)
    logits = clock.around(lambda: (product(), gather(), wait(3)), step_profile.LOGITS)
    wait(100)
    forward()
    logits()
    assert clock.seconds == {"Python of the forward pass": 3, "products": 10, "logits": 8, "reductions": 7}
    clock.move(2.0, step_profile.PRODUCTS, "attention")
    assert (clock.seconds["products"], clock.seconds["attention"]) == (8, 2)


def test_every_function_that_is_timed_exists_and_every_operation_has_a_label() -> None:
    for module, name, _ in step_profile.TARGETS:
        assert step_profile.places(module, name), f"{module}.{name}"
    assert sorted(step_profile.OF_PROGRAM) == list(range(program.CLOCKS))
    small = step_profile.places("kernels.small", "rope_write")
    assert {owner.__name__ for owner, _ in small} >= {"llama_dist.kernels.small", "llama_dist.model.attention"}


def test_kernels_of_a_device_are_known_by_their_names() -> None:
    names = {
        "nvjet_tst_128x64": 0.2,
        "_row": 0.1,
        "void cutlass::Kernel2<cutlass_80_wmma>": 0.1,
        "flash_fwd_splitkv_kernel": 0.1,
        "_spans": 0.1,
        "ncclDevKernel_AllReduce_Sum_bf16": 0.1,
        "void at::native::reduce_kernel": 0.05,
        "_round": 0.02,
        "Memcpy HtoD (Pinned -> Device)": 0.03,
    }
    ends = [*itertools.accumulate(names.values())]
    kernels = [(name, end - took, end) for end, (name, took) in zip(ends, names.items(), strict=True)]
    # One that is started early and waits for the one in front of it; one within another.
    kernels[4] = ("_spans", 0.45, kernels[4][2])
    kernels.append(("_norm", 0.01, 0.19))
    shares = device_profile.shares_of(kernels, 1.0)
    assert shares == {
        "products": pytest.approx(0.4),
        "attention": pytest.approx(0.2),
        "reductions": pytest.approx(0.1),
        "norms, rotation, gate": pytest.approx(0.05),
        "sampling": pytest.approx(0.02),
        "copies": pytest.approx(0.03),
        "waiting for the host": pytest.approx(0.2),
    }
