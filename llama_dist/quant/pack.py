"""Weights to whole numbers and back, or into panels: by C++, and the same in torch's operations, bit for bit."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from ctypes import c_int, c_int64, c_void_p
from typing import Any

import torch

from llama_dist.kernels import build
from llama_dist.quant.packed import Packed, empty
from llama_dist.quant.scheme import BFLOAT16, BLOCK, GROUP, INT4, groups_of

LARGEST = 1e30  # of a weight: sums of squares must not overflow
SMALLEST = 1e-30  # of the largest scale of a unit of a row; below it the weights count as zero
SHRUNK = (1.0, 0.95, 0.9, 0.85, 0.8)
"""Ranges that are tried for a group of int4, as shares of the whole one: few weights lie at its ends."""


@functools.cache
def _compiled() -> Any:
    return build.function("pack", c_int, c_void_p, *[c_int64] * 5, *[c_void_p] * 3, c_int)


@functools.cache
def _look_up() -> Any:
    return build.function("look_up", c_int, c_void_p, c_int64, c_int64, c_void_p, c_int64, c_int64, c_void_p)


@functools.cache
def _lay() -> Any:
    return build.function("lay_out", c_int, c_void_p, *[c_int64] * 5, c_void_p, c_int)


def pack(into: Packed, w: torch.Tensor, first: int = 0) -> int | None:
    """Pack rows w [n, k], the first of them row `first`, a multiple of 16, of `into`.

    Fewer rows than whole blocks, and fewer columns than `into` has, are filled up with zeros. Returns None, or a row of
    w at or after which a number is NaN or beyond 1e30: it cannot be packed, unless the scheme is exact.
    """
    assert first % BLOCK == 0 and w.shape[1] <= into.shape[1], (first, w.shape, into.shape)
    blocks = into.blocks(first // BLOCK, -(-(first + len(w)) // BLOCK))
    if into.scheme.exact:
        _lay_out_exact(blocks, w)
        return None
    w = w.to("cpu", torch.float32).contiguous()
    if into.device.type != "cpu":
        room = empty(into.scheme, blocks.padded_rows, into.unit, into.n_units, w.device)
        wrong = pack(room, w)
        for ours, theirs in zip(blocks.parts, room.parts, strict=True):
            ours.copy_(theirs)
        return wrong
    if _compiled() is None:
        return pack_twin(blocks, w)
    parts = [t.data_ptr() for t in blocks.parts]
    sizes = (w.shape[1], len(w), w.shape[1], into.unit, into.n_units)
    wrong = _compiled()(into.scheme.kind, w.data_ptr(), *sizes, *parts, torch.get_num_threads())
    return wrong - 1 if wrong else None


def _lay_out_exact(into: Packed, w: torch.Tensor) -> None:
    numbers, unit, n_units = into.numbers, into.unit, into.n_units
    w = w.to(numbers.device, numbers.dtype).contiguous()
    if numbers.device.type == "cpu" and _lay() is not None and numbers.is_contiguous():
        sizes = (w.shape[1], len(w), w.shape[1], unit, n_units)
        where = (w.data_ptr(), *sizes, into.codes.data_ptr())
        _lay()(numbers.dtype == torch.bfloat16, *where, torch.get_num_threads())
        return
    padded = _padded(into, w).flatten(1)  # [rows, k]
    pairs = padded.view(-1, BLOCK, padded.shape[1] // 2, 2).transpose(1, 2)
    numbers.copy_(pairs if numbers.ndim == 4 else pairs.transpose(2, 3).reshape(numbers.shape))


def _padded(into: Packed, w: torch.Tensor) -> torch.Tensor:
    """w filled up with zeros to whole blocks, units and groups: [rows, units, numbers of a unit]."""
    unit, n_units = into.unit, into.n_units
    room = w.new_zeros(into.padded_rows, n_units * unit)
    room[: len(w), : w.shape[1]] = w
    return torch.nn.functional.pad(room.view(-1, n_units, unit), (0, groups_of(unit) * GROUP - unit))


def _sum(x: torch.Tensor) -> torch.Tensor:
    """Over the last dimension, one number after the other."""
    total = torch.zeros_like(x[..., 0])
    for part in x.unbind(-1):
        total = total + part
    return total


def _inverse(x: torch.Tensor) -> torch.Tensor:
    return torch.where(x > 0, 1 / x, torch.zeros_like(x))


def _search(w: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """For groups w [..., 32] the scale and the low end of their codes, such that w is near low + scale * code."""
    low, high, total = w.amin(-1).clamp(max=0), w.amax(-1).clamp(min=0), _sum(w)
    scale = widest = (high - low) * (1 / 15)
    lowest, least = low, torch.full_like(low, torch.inf)

    def codes(scale: torch.Tensor, low: torch.Tensor) -> torch.Tensor:
        return ((w - low[..., None]) * _inverse(scale)[..., None]).clamp(0, 15).round()

    for shrunk in SHRUNK:
        tried, from_ = widest * shrunk, lowest * shrunk
        q = codes(tried, from_)
        n_codes, squares, products = _sum(q), _sum(q * q), _sum(w * q)
        spread = GROUP * squares - n_codes * n_codes
        fitted, at = (
            (GROUP * products - n_codes * total) / spread,
            (squares * total - n_codes * products) / spread,
        )
        above = at > 0  # no zero point stands for it
        fitted, at = torch.where(above, products / squares, fitted), at.masked_fill(above, 0)
        can = (spread > 0) & (fitted > 0)
        fitted, at = torch.where(can, fitted, tried), torch.where(can, at, from_)
        error = _sum((codes(fitted, at) * fitted[..., None] + at[..., None] - w).square())
        better = error < least
        scale, low, least = (torch.where(better, new, old) for new, old in ((fitted, scale), (at, low), (error, least)))
    return scale, low


def pack_twin(into: Packed, w: torch.Tensor) -> int | None:
    """`pack` in torch's operations, w float32 from the first row on."""
    n_units, groups = into.n_units, groups_of(into.unit)
    g = _padded(into, w).view(-1, n_units, groups, GROUP)
    if into.scheme.floats:
        codes, scales, factors = _floats(g)
    else:
        codes, scales, factors = _fitted(g) if into.scheme == INT4 else _even(g, into.scheme.bits)
    into.factors.copy_(factors.view(-1, BLOCK, n_units).transpose(1, 2))
    laid = [s.view(-1, BLOCK, n_units * groups).transpose(1, 2) for s in scales]
    into.scales.copy_(torch.cat(laid, -1).to(torch.uint8)) if laid else None
    into.codes.copy_(_lay_out(codes.flatten(1, 2), into.scheme.bits))
    sound = (w.abs() < LARGEST).all(1)
    return None if bool(sound.all()) else int(sound.logical_not().int().argmax()) // BLOCK * BLOCK


def _factors(scale: torch.Tensor, most: int = 255) -> torch.Tensor:
    largest = scale.amax(-1)
    return (largest * (1 / most)).masked_fill(largest <= SMALLEST, 0)


def _floats(g: torch.Tensor) -> tuple[torch.Tensor, Sequence[torch.Tensor], torch.Tensor]:
    """Codes and factors of groups [rows, units, groups, 32] as floats of 8 bits, of which the largest is 448."""
    factor = _factors(g.abs().amax(-1), 448)
    found = (g * _inverse(factor)[..., None, None]).clamp(-448, 448)  # of a NaN it is one
    return found.to(torch.float8_e4m3fn).view(torch.uint8), (), factor


def _even(g: torch.Tensor, bits: int) -> tuple[torch.Tensor, Sequence[torch.Tensor], torch.Tensor]:
    """Codes, scales and factors of groups [rows, units, groups, 32], zero in the middle of the codes."""
    most = 2 ** (bits - 1) - 1
    span = g.abs().amax(-1) * (1 / most)
    factor = _factors(span)
    scale = (span * _inverse(factor)[..., None]).ceil().clamp(max=255)  # upwards: the largest must fit
    by = _inverse(scale * factor[..., None])[..., None]
    return (g * by).clamp(-most, most).round() + (most + 1), (scale,), factor


def _fitted(g: torch.Tensor) -> tuple[torch.Tensor, Sequence[torch.Tensor], torch.Tensor]:
    """The same of four bits, with scales and zero points."""
    span, low = _search(g)
    factor = _factors(span)
    exact = span * _inverse(factor)[..., None]
    scale = exact.round().clamp(1, 255).masked_fill(exact <= 0, 0)
    by = _inverse(scale * factor[..., None])
    zero = (-low * by * 16).clamp(0, 255).round()
    steps = g * by[..., None]
    for _ in range(2):
        q = (steps + zero[..., None] * (1 / 16)).clamp(0, 15).round()
        zero = (_sum(q - steps) * (16 / GROUP)).clamp(0, 255).round()  # the best one for these codes
    return (steps + zero[..., None] * (1 / 16)).clamp(0, 15).round(), (scale, zero), factor


def _lay_out(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes [rows, groups, 32] -> uint8 [blocks, groups, bytes], as kernels/src/groups.h says."""
    # row 16 b + r, number 4 s + k of the group -> [b, group, s, r, k]
    laid = codes.to(torch.uint8).view(-1, BLOCK, codes.shape[1], GROUP // 4, 4).permute(0, 2, 3, 1, 4)
    if bits == 8:
        return laid.flatten(2)
    low, high = laid & 15, laid >> 4
    lines = [low[:, :, :4] | low[:, :, 4:] << 4]
    if bits == 6:
        lines.append(high[:, :, :4:2] | high[:, :, 4::2] << 2 | high[:, :, 1:4:2] << 4 | high[:, :, 5::2] << 6)
    return torch.cat(lines, 2).flatten(2)


def _codes(w: Packed) -> torch.Tensor:
    """The codes as they were laid out: uint8 [blocks, groups, 8, 16, 4]."""
    lines = w.codes.view(len(w.codes), w.n_units * groups_of(w.unit), -1, BLOCK, 4)
    if w.scheme.bits == 8:
        return lines
    laid = torch.cat((lines[:, :, :4] & 15, lines[:, :, :4] >> 4), 2)
    if w.scheme.bits == 6:
        for at, shift in ((0, 0), (4, 2), (1, 4), (5, 6)):
            laid[:, :, at : at + 3 : 2] |= (lines[:, :, 4:] >> shift & 3) << 4
    return laid


def unpack(w: Packed, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """The weights that the codes stand for: [rows, n_units * unit], computed in `dtype`."""
    n_units, groups = w.n_units, groups_of(w.unit)
    if w.scheme.exact:
        laid = w.numbers.transpose(1, 2).reshape(-1, n_units, groups * GROUP).to(dtype)
        return laid[..., : w.unit].reshape(-1, n_units * w.unit)[: w.rows]
    if w.scheme.floats:
        steps = _codes(w).view(torch.float8_e4m3fn).to(dtype)
    else:
        scale, ends = w.scales[..., :BLOCK].to(dtype), w.scales[..., BLOCK:].to(dtype)
        zero = ends / 16 if w.scheme == INT4 else torch.full_like(scale, 2 ** (w.scheme.bits - 1))
        steps = (_codes(w).to(dtype) - zero[:, :, None, :, None]) * scale[:, :, None, :, None]
    # [b, group, s, r, k] -> row 16 b + r, number 4 s + k of the group
    of_row = steps.permute(0, 3, 1, 2, 4).reshape(-1, n_units, groups * GROUP)
    factors = w.factors.to(dtype).transpose(1, 2).reshape(-1, n_units, 1)
    return (of_row[..., : w.unit] * factors).reshape(-1, n_units * w.unit)[: w.rows]


def rows(w: Packed, ids: torch.Tensor) -> torch.Tensor:
    """Rows of exact weights in one unit: ids [n] int64 -> [n, unit], in their own dtype. IndexError."""
    assert w.scheme.exact and w.n_units == 1, (w.scheme, w.n_units)
    if w.device.type != "cpu" or _look_up() is None:
        return rows_twin(w, ids)
    bf16 = w.scheme == BFLOAT16
    out = torch.empty(len(ids), w.unit, dtype=torch.bfloat16 if bf16 else torch.float32)
    assert ids.dtype == torch.int64 and ids.is_contiguous() and w.codes.is_contiguous(), "int64, packed"
    panel = w.codes.stride(0) // out.element_size()
    sizes = (len(ids), w.unit, out.data_ptr())
    fault = _look_up()(bf16, w.codes.data_ptr(), panel, w.padded_rows, ids.data_ptr(), *sizes)
    if fault:
        raise IndexError(f"row {int(ids[fault - 1])} of {w.rows}")
    return out


def rows_twin(w: Packed, ids: torch.Tensor) -> torch.Tensor:
    """`rows` in torch's operations."""
    return w.numbers[ids // BLOCK, :, ids % BLOCK].reshape(len(ids), -1)[:, : w.unit]
