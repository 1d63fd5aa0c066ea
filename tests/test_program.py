"""A program by itself: rows looked up, products and what follows them, threads that wait, calls that are refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from llama_dist.kernels.attention import attend
from llama_dist.kernels.program import Call, Program
from llama_dist.kernels.small import silu_mul
from llama_dist.kernels.tree import roots, total
from llama_dist.quant import product
from llama_dist.quant.pack import pack
from llama_dist.quant.packed import EXACT, Packed, empty
from tests.kernel_cases import DTYPES, arguments, need_kernels, same_bits, text, threads

VOCAB, WIDTH = 37, 22


def table(dtype: torch.dtype) -> torch.Tensor:
    rows = torch.randn(VOCAB, WIDTH, generator=torch.Generator().manual_seed(1)).to(dtype)
    rows[:, ::7] = -0.0
    return rows


def laid(w: torch.Tensor, n_units: int = 1) -> Packed:
    held = empty(EXACT[w.dtype], len(w), w.shape[1] // n_units, n_units, w.device)
    pack(held, w)
    return held


def draws(n: int, width: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, width, generator=torch.Generator().manual_seed(seed)).to(dtype)


def call(tokens: list[int], **other: int) -> tuple[Call, Any]:
    """A call without attention, and the tensors to keep while it runs."""
    n = len(tokens)
    ids, slots, angles = torch.tensor(tokens), torch.arange(n), torch.zeros(n, dtype=torch.int64)
    if "slot" in other:
        slots[-1] = other["slot"]
    if "angle" in other:
        angles[-1] = other["angle"]
    zero, one, cos = torch.zeros(1, dtype=torch.int32), torch.ones(1, dtype=torch.int32), torch.zeros(1, 4)
    held = (ids, slots, angles, zero, zero, one, cos, cos)
    return Call(n, 1, 1, other.get("n_slots", 16), VOCAB, 1, *(t.data_ptr() for t in held)), held


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("lay", [laid, torch.Tensor.clone], ids=["panels", "rows"])
def test_rows_are_looked_up(dtype: torch.dtype, lay: Callable[[torch.Tensor], torch.Tensor | Packed]) -> None:
    """Those of a part of the table; of the others zeros. -0 stays, or becomes 0."""
    need_kernels()
    w, tokens = table(dtype), [0, 36, 15, 16, 32, 7, 31]
    for plus in (False, True):
        for first, rows in ((0, VOCAB), (16, 16), (32, 5), (0, 0)):
            program = Program(8, dtype)
            out = program.rows("x", WIDTH).fill_(9)
            program.embed(lay(w[first : first + rows] if rows else w), first, rows, plus, out)
            asked, _held = call(tokens)
            program.run(asked)
            expected = torch.stack(
                [w[t] if first <= t < first + rows else torch.zeros(WIDTH).to(dtype) for t in tokens]
            )
            assert same_bits(out[: len(tokens)], expected + 0.0 if plus else expected), (plus, first)
            assert (out[len(tokens) :] == 9).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_head_may_be_left_out(dtype: torch.dtype) -> None:
    need_kernels()
    w = table(dtype)
    program = Program(4, dtype)
    x, y = program.rows("x", WIDTH).fill_(9), program.rows("y", VOCAB).fill_(9)
    program.embed(laid(w), 0, VOCAB, False, x)
    program.head()
    program.linear(x, laid(w), None, y)
    asked, _held = call([3, 4])
    program.run(asked, head=False)
    assert same_bits(x[:2], w[3:5]) and (y == 9).all()
    x.fill_(9)
    program.run(asked)
    assert same_bits(x[:2], w[3:5]) and (y[2:] == 9).all()
    assert torch.allclose(y[:2].float(), (w[3:5].double() @ w.double().T).float(), rtol=0.01, atol=0.05)


ROWS = (1, 3, 6, 7, 9, 16, 17, 40, 64, 71, 200)
"""Few that go one by one, a tile, several, and some that do not fill the last."""


def check_rows(program: Program, out: torch.Tensor, true: torch.Tensor) -> None:
    """However many rows the program is run for, they become `true`, and those beside them stay."""
    for n in ROWS:
        for n_threads in (1, 3):
            out.fill_(9)
            asked, _held = call([0] * n, n_slots=max(ROWS))
            with threads(n_threads):
                program.run(asked)
            assert same_bits(out[:n], true[:n]) and (out[n:] == 9).all(), (n, n_threads)


@pytest.mark.parametrize(("hidden", "apart", "bias"), [(96, 96, 0), (40, 48, 0), (40, 40, 0), (32, 32, 1)])
@pytest.mark.parametrize(("dim", "at"), [(64, 0), (64, 8), (37, 0), (640, 0), (2100, 0)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_gate_after_its_product(dtype: torch.dtype, dim: int, at: int, hidden: int, apart: int, bias: int) -> None:
    """The bits of both one by one, also where they are done as one."""
    need_kernels()
    w = laid(draws(apart + hidden, dim, dtype))
    b = draws(1, apart + hidden, dtype, 1)[0].contiguous() if bias else None
    program = Program(max(ROWS), dtype)
    x, y = program.rows("x", dim + at)[:, at:], program.rows("y", apart + hidden)
    x.copy_(draws(max(ROWS), dim, dtype, 2))
    out = program.rows("out", hidden)
    program.linear(x, w, b, y)
    program.gate(y[:, :hidden], y[:, apart:], out)
    made = product.linear(x, w, b)
    true = silu_mul(made[:, :hidden], made[:, apart:])
    check_rows(program, out, true)


@pytest.mark.parametrize(("width", "unit", "n_units"), [(50, 64, 9), (32, 32, 8), (17, 24, 5), (48, 288, 11)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_sum_of_planes_after_its_product(dtype: torch.dtype, width: int, unit: int, n_units: int) -> None:
    need_kernels()
    w, nodes = laid(draws(width, unit * n_units, dtype), n_units), roots(0, n_units)
    program = Program(max(ROWS), dtype)
    x, y = program.rows("x", unit * n_units), program.rows("y", width)
    x.copy_(draws(max(ROWS), unit * n_units, dtype, 2))
    planes = program.rows("planes", width, len(nodes))
    program.unit_sums(x, w, 0, planes)
    program.add_planes(planes, nodes, y)
    true = total(nodes, list(product.unit_sums(x, w, 0))).to(dtype)
    check_rows(program, y, true)


@pytest.mark.parametrize("head_dim", [20, 64])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layers_share_how_attention_is_dealt_out(dtype: torch.dtype, head_dim: int) -> None:
    """Those that are alike; with a window, or heads that read others, anew. The bits are each layer's own."""
    need_kernels()
    layers = [((0, 0, 0, 1, 1, 2), 0), ((0, 0, 0, 1, 1, 2), 0), ((0, 0, 0, 1, 1, 2), 600), ((0, 1, 1, 2, 2, 2), 0)]
    texts = [text(1100, 6, 3, head_dim, dtype, seed=i) for i in range(len(layers))]
    program = Program(1, dtype)
    out, true, held = [], [], []
    for it, (of_query, window) in zip(texts, layers, strict=True):
        q, keys, values, tables, starts, counts, reads = arguments([(it, 1099, 1100)], of_query, compiled=True)
        true.append(attend(q, keys, values, tables, starts, counts, reads, window).flatten(1))
        out.append(program.rows(f"out {len(out)}", 6 * head_dim))
        program.attend(q.flatten(1), keys, values, reads, window, out[-1])
        held.append((q, keys, values, reads))
    some, _held = call([0])
    places = (t.data_ptr() for t in (tables, starts, counts))
    asked = Call(*some[:2], tables.shape[1], keys.shape[1], *some[4:9], *places, *some[12:])
    for n_threads in (1, 2, 3, 7):
        with threads(n_threads):
            for _ in range(3):
                for rows in out:
                    rows.fill_(9)
                program.run(asked)
                assert all(map(same_bits, out, true)), n_threads


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_likeliest_are_found(dtype: torch.dtype) -> None:
    """The first of equals among the numbers asked for; none where one of them is not finite."""
    need_kernels()
    program = Program(4, dtype)
    x = program.rows("x", WIDTH)
    found = program.likeliest(x, WIDTH - 1)
    x.copy_(torch.randn(4, WIDTH))
    x[0, [5, 9]], x[0, WIDTH - 1] = 7.0, 8.0
    x[1, 3] = float("nan")
    x[2, WIDTH - 1] = float("inf")
    asked, _held = call([1, 2, 3])
    program.run(asked)
    assert found.tolist() == [5, -1, int(x[2, : WIDTH - 1].argmax()), 0]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n_threads", "n"), [(2, 3), (3, 3), (7, 3), (2, 40)])
def test_threads_wait_for_each_other(dtype: torch.dtype, n_threads: int, n: int) -> None:
    """Each operation reads what others' threads have just written, also where there are more threads than cores."""
    need_kernels()
    wide, rows = 448, torch.Generator().manual_seed(2)
    up = (torch.randn(2 * wide, WIDTH, generator=rows) / 4).to(dtype)
    down = (torch.randn(WIDTH, wide, generator=rows) / 20).to(dtype)
    program = Program(n, dtype)
    x, gated = program.rows("x", WIDTH), program.rows("gated", wide)
    both, y = program.rows("both", 2 * wide), program.rows("y", WIDTH)
    program.embed(laid(table(dtype)), 0, VOCAB, False, x)
    for _ in range(40):
        program.norm(x, torch.ones(WIDTH, dtype=dtype), 1e-5, y)
        program.linear(y, laid(up), None, both)
        program.gate(both[:, :wide], both[:, wide:], gated)
        program.linear(gated, laid(down), None, y)
        program.add(x, y, x)
    asked, _held = call([i % VOCAB for i in range(3, 3 + n)], n_slots=max(n, 16))
    with threads(1):
        program.run(asked)
    alone = x.clone()
    assert alone.isfinite().all() and alone.abs().max() > 0.1
    for _ in range(20):
        x.fill_(9), both.fill_(9), gated.fill_(9), y.fill_(9)
        with threads(n_threads):
            program.run(asked)
        assert same_bits(x, alone)


@pytest.mark.parametrize(
    "tokens, other, said",
    [
        ([3, VOCAB], {}, "token 1 .* 37 ids"),
        ([-1, 3], {}, "token 0 .* 37 ids"),
        ([3, 4], {"slot": 16}, "token 1 .* 16 slots"),
        ([3, 4], {"slot": -1}, "token 1 .* 16 slots"),
        ([3, 4], {"angle": 1}, "token 1 .* 1 angles"),
    ],
)
def test_what_is_not_there_is_refused(tokens: list[int], other: dict[str, int], said: str) -> None:
    need_kernels()
    w = table(torch.float32)
    program = Program(4, torch.float32)
    x = program.rows("x", WIDTH).fill_(9)
    program.embed(laid(w), 0, VOCAB, False, x)
    asked, _held = call(tokens, **other)
    with pytest.raises(IndexError, match=said):
        program.run(asked)
    assert (x == 9).all()
