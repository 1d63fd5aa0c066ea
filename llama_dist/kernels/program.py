"""A list of kernels, laid out once and run by one call in C++: what a forward pass of few rows is made of.

Each operation is packed with the addresses of its tensors, which the program keeps alive. Rows are those of the call:
tensors have room for `most` of them. Where it finds the likeliest tokens, several runs may be one call. The bits are
those of the same operations called one by one. A product whose next operation adds up its planes, or is the gate of
what it made, may be done with that as one: nothing else may read what is handed on.
"""

from __future__ import annotations

import functools
import struct
from array import array
from collections.abc import Callable, Sequence
from ctypes import byref, c_char_p, c_int, c_int64, c_void_p, cast
from typing import Any, NamedTuple

import torch

from llama_dist.kernels import build, quantized
from llama_dist.kernels.tree import Node
from llama_dist.quant.packed import Packed

# Kinds of operations, as in program.h; the head's product has a clock of its own.
NORM, ROPE, ATTEND, GATE, PLANES, PACKED, SHARED_SUM, SHARED_PLANES, EMBED, LIKELIEST, SHARED_LIKELIEST = range(11)
HEAD, CLOCKS = 11, 12
OP = struct.Struct("=16q")
STEP = struct.Struct("=16q")
CHANCE, ONWARD = struct.Struct("=Qqddd"), struct.Struct("=12q")  # as in passes.cpp
LEFT = -2  # in a token's place: left to the sampler
MOST_ON = 64  # rows of runs in one call


class Call(NamedTuple):
    """What changes from call to call, as in program.h: sizes, then addresses.

    Of the n tokens, int64 [n]: ids below `vocab`, slots of the cache below `n_slots`, and rows of cos and sin, float32
    [n_angles, head_dim / 2]. Of the spans, int32: tables [spans, pages], starts and counts [spans].
    """

    n: int
    spans: int
    pages: int
    n_slots: int
    vocab: int
    n_angles: int
    tokens: int
    slots: int
    angles: int
    tables: int
    starts: int
    counts: int
    cos: int
    sin: int


class Chance(NamedTuple):
    """How a sequence's tokens are drawn: what of `sampler.noise_key` is its seed's, the rest as in SamplingParams."""

    key: int
    top_k: int
    temperature: float
    top_p: float
    min_p: float


@functools.cache
def _compiled() -> Any:
    return build.function("program", c_char_p, c_int64, c_char_p, c_int, c_void_p)


@functools.cache
def _onward() -> Any:
    return build.function("passes", c_char_p, c_int64, c_char_p, c_char_p, c_int, c_void_p, c_void_p)


def compiled() -> bool:
    """Whether programs can run here."""
    return _compiled() is not None


@functools.cache
def pack(nodes: tuple[tuple[Node, ...], ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """How many nodes of the tree each rank has [ranks], and all of them [n, 2] in order of ranks, as C++ reads them."""
    counts = torch.tensor([len(mine) for mine in nodes])
    return counts, torch.tensor([node for mine in nodes for node in mine])


class Program:
    """Operations in order, for up to `most` rows of `dtype` (bfloat16 or float32), on the CPU.

    `seconds`, where there is one, float64 [CLOCKS]: what the operations of each kind take is added to it.
    """

    def __init__(self, most: int, dtype: torch.dtype) -> None:
        self.most, self.dtype = most, dtype
        self._parts: list[bytearray | Callable[[int], None]] = []
        self._clock: int | None = None
        self._headless = 0, 0  # parts, and operations of the last of them, before the head
        self._ready: dict[bool, list[tuple[bytes, int] | Callable[[int], None]]] = {}  # as they are run, by `head`
        self._rows: dict[str, torch.Tensor] = {}
        self._held: list[torch.Tensor] = []
        self._found: list[array[int]] = []
        self._logits: tuple[int, ...] = ()  # as in passes.cpp
        self.seconds: torch.Tensor | None = None
        self._lost: Callable[[int], Exception] | None = None

    def rows(self, name: str, width: int, planes: int = 0) -> torch.Tensor:
        """The tensor [most, width] of that name, to hand rows on; or planes [planes, most, width] of float32.

        The same name gives the same tensor: operations that follow one another share it.
        """
        shape = (planes, self.most, width) if planes else (self.most, width)
        found = self._rows.get(name)
        if found is None:
            found = self._rows[name] = torch.empty(shape, dtype=torch.float32 if planes else self.dtype)
        assert found.shape == shape, f"{name} is {tuple(found.shape)}, asked for {shape}"
        return found

    def call(self, function: Callable[[int], None]) -> None:
        """Have `function` called with the number of rows at this place."""
        self._parts.append(function)

    def head(self) -> None:
        """What is added from now on is the output head, which `run` leaves out where it is told so."""
        last = self._parts[-1]
        assert isinstance(last, bytearray), "a product comes before the head"
        self._clock, self._headless = HEAD, (len(self._parts), len(last) // OP.size)

    def _add(self, kind: int, *values: int | torch.Tensor | None) -> None:
        self._held += [v for v in values if isinstance(v, torch.Tensor)]
        assert not self._ready, "a program that has run stays as it is"
        numbers = [v.data_ptr() if isinstance(v, torch.Tensor) else v or 0 for v in values]
        if not self._parts or not isinstance(self._parts[-1], bytearray):
            self._parts.append(bytearray())
        part = self._parts[-1]
        assert isinstance(part, bytearray)
        clock = kind if self._clock is None or kind in (LIKELIEST, SHARED_LIKELIEST) else self._clock
        part += OP.pack(kind, clock, *numbers, *[0] * (14 - len(numbers)))

    def embed(self, w: torch.Tensor | Packed, first: int, rows: int, plus: bool, out: torch.Tensor) -> None:
        """out [most, width], packed = row id - `first` of w for each token; zeros where w's `rows` do not have it.

        w is rows, or exact in one unit. `plus`: a -0 becomes 0, as in a sum.
        """
        if isinstance(w, Packed):
            assert w.scheme.exact and w.n_units == 1 and w.codes.is_contiguous(), (w.scheme, w.n_units)
            self._add(EMBED, w.codes, w.codes.stride(0) // out.element_size(), 1, first, rows, plus, out.shape[1], out)
        else:
            self._add(EMBED, w, w.stride(0), 0, first, rows, plus, out.shape[1], out)

    def norm(self, x: torch.Tensor, weight: torch.Tensor, eps: float, out: torch.Tensor, groups: int = 1) -> None:
        """RMS norms over the `groups` parts of each row of x, each times weight [width / groups]; out may be x."""
        bits = int.from_bytes(struct.pack("=f", eps), "little")
        dim = x.shape[1] // groups
        assert weight.shape == (dim,), f"a weight of {tuple(weight.shape)} for {dim} numbers"
        self._add(NORM, x, x.stride(0), None, 0, None, weight, out, out.stride(0), groups, bits, dim)

    def add(self, x: torch.Tensor, y: torch.Tensor, total: torch.Tensor) -> None:
        """total = x + y, packed; y is rows, or one row [width] for all; total may be x."""
        stride = y.stride(0) if y.dim() == 2 else 0
        self._add(NORM, x, x.stride(0), y, stride, total, None, None, 0, 1, 0, x.shape[1])

    def add_norm(
        self, x: torch.Tensor, y: torch.Tensor, total: torch.Tensor, weight: torch.Tensor, eps: float, out: torch.Tensor
    ) -> None:
        """total = x + y, packed, and out its norm."""
        bits = int.from_bytes(struct.pack("=f", eps), "little")
        self._add(NORM, x, x.stride(0), y, y.stride(0), total, weight, out, out.stride(0), 1, bits, x.shape[1])

    def linear(self, x: torch.Tensor, w: Packed, bias: torch.Tensor | None, y: torch.Tensor) -> None:
        """y = x W^T + bias."""
        self._packed(x, w, bias, y, y.stride(0), 0, 0, w.rows, quantized.WHOLE)

    def unit_sums(self, x: torch.Tensor, w: Packed, first: int, planes: torch.Tensor) -> None:
        """planes [roots, most, N] float32: the partial products by unit, as `quant.product.unit_sums` has them."""
        self._packed(x, w, None, planes, planes.stride(1), planes.stride(0), 1, w.rows, first)

    def _packed(self, x: torch.Tensor, w: Packed, bias: torch.Tensor | None, y: torch.Tensor, *rest: int) -> None:
        where = torch.frombuffer(bytearray(quantized.describe(w)), dtype=torch.int64)
        self._held += w.parts
        self._add(PACKED, x, x.stride(0), where, bias, y, *rest)

    def add_planes(self, planes: torch.Tensor, nodes: Sequence[Node], y: torch.Tensor) -> None:
        """y = the planes' sum in the tree, `nodes` being what each of them holds (`kernels.tree.total`)."""
        packed = torch.tensor(nodes, dtype=torch.int64)
        self._add(PLANES, planes, planes.stride(0), packed, len(nodes), y, planes.shape[2])

    def rope(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Rotate q in place; write k, rotated, and v to the call's slots of the cache, as `rope_write` does."""
        dim, n_kv = keys.shape[2], keys.shape[0]
        sizes = (q.shape[1] // dim, n_kv, dim)
        self._add(ROPE, q, q.stride(0), k, k.stride(0), v, v.stride(0), keys, values, *sizes)

    def attend(
        self,
        q: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        of_query: torch.Tensor,
        window: int,
        out: torch.Tensor,
    ) -> None:
        """out [most, heads * head_dim], packed: attention of the call's spans (`kernels.attention.attend`)."""
        sizes = (len(of_query), keys.shape[0], keys.shape[2], window)
        self._add(ATTEND, q, q.stride(0), keys, values, of_query, *sizes, out)

    def gate(self, a: torch.Tensor, b: torch.Tensor, out: torch.Tensor) -> None:
        """out = silu(a) * b, packed."""
        self._add(GATE, a, a.stride(0), b, b.stride(0), out, out.shape[1])

    def likeliest(self, x: torch.Tensor, n: int) -> array[int]:
        """Room [most] for the number of the greatest of each row's first n entries (`kernels.single.likeliest`)."""
        found = array("q", bytes(8 * self.most))
        self._found.append(found)
        self._logits = x.data_ptr(), x.stride(0), 1, 0, 0, 0
        self._add(LIKELIEST, x, x.stride(0), n, found.buffer_info()[0])
        return found

    def shared_likeliest(
        self,
        x: torch.Tensor,
        n: int,
        first: int,
        found: array[int],
        whole: torch.Tensor,
        segment: int,
        rank: int,
        lost: Callable[[int], Exception],
    ) -> None:
        """What `likeliest` has found among x's first n entries becomes the likeliest of all ranks' entries.

        Number `first` of these, in the order of ranks, is this rank's first. `whole` [MOST_ON, ranks * width of
        x]: where `run_on` puts the rows of all.
        """
        self._lost = lost
        self._held.append(whole)
        self._logits = x.data_ptr(), x.stride(0), whole.shape[1] // x.shape[1], whole.data_ptr(), segment, rank
        self._add(SHARED_LIKELIEST, segment, rank, x, x.stride(0), n, first, found.buffer_info()[0])

    def shared_sum(self, x: torch.Tensor, segment: int, rank: int, lost: Callable[[int], Exception]) -> None:
        """x, packed, becomes the sum over the ranks that share the segment at that address (shared.h).

        Where it fails `run` raises what `lost` makes of its fault.
        """
        self._lost = lost
        self._add(SHARED_SUM, segment, rank, x, x.shape[1])

    def shared_planes(
        self,
        planes: torch.Tensor,
        nodes: tuple[tuple[Node, ...], ...],
        y: torch.Tensor,
        segment: int,
        rank: int,
        lost: Callable[[int], Exception],
    ) -> None:
        """y, packed, becomes the sum of all ranks' planes in the tree; each rank's are its own `nodes`."""
        self._lost = lost
        counts, packed = pack(nodes)
        self._add(SHARED_PLANES, segment, rank, planes, planes.stride(0), counts, packed, y, y.shape[1])

    def run(self, call: Call, head: bool = True) -> None:
        """Compute all of it for the call's rows, or all before the head. IndexError outside the cache."""
        step = self._step(call)
        for part in self._ready.get(head) or self._make_ready(head):
            if not isinstance(part, tuple):
                part(call.n)
                continue
            lost = c_int(0)
            self._refuse(call, _compiled()(*part, step, torch.get_num_threads(), byref(lost)), lost.value)

    @functools.cached_property
    def goes_on(self) -> bool:
        """Whether `run_on` serves: it finds the likeliest, and one call does it all. Asked when it is complete."""
        ready = self._ready.get(True) or self._make_ready(True)
        return bool(self._found) and len(ready) == 1 and isinstance(ready[0], tuple)

    def run_on(
        self, call: Call, passes: int, stops: Sequence[int], chances: Sequence[Chance] | None
    ) -> list[list[int]]:
        """Up to `passes` runs in one call, each of the tokens that the last has found; these, run by run.

        They are the likeliest, or with a chance for each row drawn. Every span has one token, whose angles are those of
        its position, and pages for all runs; what the call has of tokens and spans is written over. It ends early after
        a run that found one of `stops`, a row that is not finite (-1), or one that the sampler is to draw from (LEFT).
        IndexError as from `run`.
        """
        assert self.goes_on and call.n == call.spans and self._logits and call.n <= MOST_ON, (
            f"{call.n} tokens of {call.spans} spans"
        )
        (part,) = self._ready[True]
        assert isinstance(part, tuple)
        lost, done = c_int(0), c_int64(0)
        ends, tokens = array("q", stops), array("q", bytes(8 * passes * call.n))
        odds = b"".join(CHANCE.pack(*chance) for chance in chances or ())
        held = c_char_p(odds)  # alive until it has been read
        addresses = self._found[-1].buffer_info()[0], ends.buffer_info()[0], len(ends), tokens.buffer_info()[0]
        onward = ONWARD.pack(passes, *addresses, cast(held, c_void_p).value if chances else 0, *self._logits)
        fault = _onward()(*part, self._step(call), onward, torch.get_num_threads(), byref(lost), byref(done))
        self._refuse(call, fault, lost.value)
        return [tokens[i * call.n : (i + 1) * call.n].tolist() for i in range(done.value)]

    def _step(self, call: Call) -> bytes:
        assert call.n <= self.most, f"{call.n} rows, room for {self.most}"
        return STEP.pack(self.dtype == torch.bfloat16, *call, 0 if self.seconds is None else self.seconds.data_ptr())

    def _refuse(self, call: Call, fault: int, lost: int) -> None:
        if lost:
            assert self._lost is not None
            raise self._lost(lost)
        if fault:
            what = f"span {fault - 1} has pages" if fault > 0 else f"token {-fault - 1} has an id, angles or a slot"
            held = f"{call.vocab} ids, {call.n_slots} slots and {call.n_angles} angles"
            raise IndexError(f"{what} outside of what there is: {held}")

    def _make_ready(self, head: bool) -> list[tuple[bytes, int] | Callable[[int], None]]:
        n_parts, n_last = (len(self._parts), None) if head else self._headless
        ready: list[tuple[bytes, int] | Callable[[int], None]] = []
        for i, part in enumerate(self._parts[:n_parts], 1):
            if isinstance(part, bytearray):
                last = n_last if i == n_parts else None
                ready.append((bytes(part), len(part) // OP.size if last is None else last))
            else:
                ready.append(part)
        self._ready[head] = ready
        return ready
