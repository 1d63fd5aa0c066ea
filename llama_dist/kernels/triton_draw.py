"""A token for each of several rows in Triton, in a few launches that wait for nobody: the sampler's, or UNSURE.

As engine/device_draws.py goes about it: of a row the greatest with noise is found, then whether the filters keep it; if
they do not, only tokens likelier than it are in question, and the greatest of these is next. Every round is a launch
over chunks of the rows, whose programs first put together what those of the round before found.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from llama_dist.kernels.draw import CLOSE, ROUNDS, SMALLEST, UNSURE, Draw
from llama_dist.kernels.told import sent
from llama_dist.kernels.triton_ahead import ahead, follow

CHUNK = 2048  # numbers of a row that a program looks at
N_PARAMS, N_PARTS, N_STATE = 5, 5, 5
OPEN, FOUND, LEFT = 0, 1, 2  # how it stands with a row
FIRST, SECOND, LATER, LAST = 0, 1, 2, 3  # rounds: none has a candidate before it, none is decided on, and so on


@triton.jit  # type: ignore[untyped-decorator]
def _numbers(logits: tl.tensor, param: tl.tensor, at: tl.tensor, vocab: tl.tensor) -> tuple[tl.tensor, tl.tensor]:
    """Logits of a row in float64, and over its temperature; -inf past the end."""
    row = tl.load(logits + tl.load(param) + at, mask=at < vocab, other=float("-inf")).to(tl.float32).to(tl.float64)
    return row, row / tl.load(param + 2).to(tl.float64, bitcast=True)


@triton.jit  # type: ignore[untyped-decorator]
def _noise(key: tl.tensor, at: tl.tensor) -> tl.tensor:
    """As `engine.sampler.gumbel_of`."""
    x = (at + 1).to(tl.uint64) * 0x9E3779B97F4A7C15 + key
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB
    x = (x ^ (x >> 31)) >> 11
    return -tl.log(-tl.log((x.to(tl.int64).to(tl.float64) + 0.5) * 1.1102230246251565e-16))


@triton.jit(do_not_specialize=("logits", "vocab", "chunks"))  # type: ignore[untyped-decorator]
def _masses(
    logits: tl.tensor,
    numbers: tl.tensor,
    mass: tl.tensor,
    vocab: tl.tensor,
    chunks: tl.tensor,
    N_PARAMS: tl.constexpr,
    CHUNK: tl.constexpr,
    AHEAD: tl.constexpr,
) -> None:
    """Of each chunk of a row its greatest, and the sum of the weights beside that one's: mass [rows, chunks, 2]."""
    follow(AHEAD)
    row, chunk = tl.program_id(1), tl.program_id(0)
    at = (chunk * CHUNK + tl.arange(0, CHUNK)).to(tl.int64)
    _, scaled = _numbers(logits, numbers + row * N_PARAMS, at, vocab)
    greatest = tl.max(scaled, 0)
    weights = tl.exp(scaled - tl.where(greatest == float("-inf"), 0.0, greatest))
    place = mass + (row * chunks + chunk) * 2
    tl.store(place, greatest)
    tl.store(place + 1, tl.sum(weights, 0))


@triton.jit(do_not_specialize=("logits", "vocab", "chunks"))  # type: ignore[untyped-decorator]
def _round(
    logits: tl.tensor,
    numbers: tl.tensor,
    mass: tl.tensor,
    before: tl.tensor,
    after: tl.tensor,
    state: tl.tensor,
    next_state: tl.tensor,
    found: tl.tensor,
    vocab: tl.tensor,
    chunks: tl.tensor,
    KIND: tl.constexpr,
    N_PARAMS: tl.constexpr,
    N_PARTS: tl.constexpr,
    N_STATE: tl.constexpr,
    CLOSE: tl.constexpr,
    SMALLEST: tl.constexpr,
    UNSURE: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    AHEAD: tl.constexpr,
) -> None:
    """Decide on the candidate of a row by its `before` [chunks, N_PARTS], take the next one, and look around it.

    `state` of a row: OPEN, FOUND or LEFT; the candidate or the token; its logit; the greatest of the row, scaled; the
    sum of its weights. `after`: of each chunk how many tokens are likelier than the candidate, and their mass; of these
    the greatest with noise, its id, and the next one's value.
    """
    follow(AHEAD)
    row, chunk = tl.program_id(1), tl.program_id(0)
    param = numbers + row * N_PARAMS
    key = tl.load(param + 1).to(tl.uint64, bitcast=True)
    temperature = tl.load(param + 2).to(tl.float64, bitcast=True)
    top_p = tl.load(param + 3).to(tl.float64, bitcast=True)
    min_p = tl.load(param + 4).to(tl.float64, bitcast=True)
    all_chunks = tl.arange(0, CHUNKS)
    real = all_chunks < chunks
    of_row = all_chunks + row * chunks
    minus = float("-inf")

    if KIND == 0:
        each = tl.load(mass + of_row * 2, mask=real, other=minus)
        greatest = tl.max(each, 0)
        whole = tl.sum(tl.load(mass + of_row * 2 + 1, mask=real, other=0.0) * tl.exp(each - greatest), 0)
        how = tl.zeros((), tl.float64)
        token = tl.zeros((), tl.float64) - 1.0
        logit = tl.zeros((), tl.float64) + minus  # all are likelier
    else:
        held = state + row * N_STATE
        how = tl.load(held)
        token = tl.load(held + 1)
        logit = tl.load(held + 2)
        greatest = tl.load(held + 3)
        whole = tl.load(held + 4)
        part = before + of_row * N_PARTS
        if KIND >= 2:
            count = tl.sum(tl.load(part, mask=real, other=0.0), 0)
            share = tl.sum(tl.load(part + 1, mask=real, other=0.0), 0) / whole
            weight = tl.exp(logit / temperature - greatest)
            first = count == 0.0
            close = (tl.abs(share - top_p) < CLOSE) | (tl.abs(weight - min_p) < CLOSE)
            close = close | (tl.abs(logit) < SMALLEST * temperature)
            kept = first | ((share < top_p) & (weight > min_p))
            decided = tl.where(first | (close == 0), tl.where(kept, 1.0, 0.0), 2.0)
            how = tl.where(how == 0.0, decided, how)
        values = tl.load(part + 2, mask=real, other=minus)
        best = tl.max(values, 0)
        winner = tl.min(tl.where(values == best, all_chunks, CHUNKS), 0)
        ids = tl.load(part + 3, mask=real, other=0.0)
        chosen = tl.sum(tl.where(all_chunks == winner, ids, 0.0), 0)
        seconds = tl.load(part + 4, mask=real, other=minus)
        second = tl.max(tl.where(all_chunks == winner, seconds, values), 0)
        sure = best - second > CLOSE + 1e-15 * tl.abs(best)
        unfiltered = (top_p > 1.0) & (min_p < 0.0)
        token = tl.where(how == 0.0, chosen, token)
        place = logits + tl.load(param) + token.to(tl.int64)
        logit = tl.load(place, mask=token < vocab, other=float("nan")).to(tl.float32).to(tl.float64)
        how = tl.where(how == 0.0, tl.where(sure, tl.where(unfiltered, 1.0, 0.0), 2.0), how)
    if chunk == 0:
        if KIND == 3:
            tl.store(found + row, tl.where(how == 1.0, token, UNSURE).to(tl.int64))
        else:
            to = next_state + row * N_STATE
            tl.store(to, how)
            tl.store(to + 1, token)
            tl.store(to + 2, logit)
            tl.store(to + 3, greatest)
            tl.store(to + 4, whole)
    if KIND < 3:  # noqa: SIM102 - of these two the compiler settles this one
        if how == 0.0:
            at = (chunk * CHUNK + tl.arange(0, CHUNK)).to(tl.int64)
            here, scaled = _numbers(logits, param, at, vocab)
            if KIND == 0:
                likelier = at < vocab
            else:
                likelier = (at < vocab) & ((here > logit) | ((here == logit) & (at < token.to(tl.int64))))
            weights = tl.where(likelier, tl.exp(scaled - greatest), 0.0)
            asked = likelier & (weights >= min_p - CLOSE)
            noisy = tl.where(asked, scaled + _noise(key, at), minus)
            best_here = tl.max(noisy, 0)
            id_here = tl.min(tl.where(noisy == best_here, at, vocab), 0)
            to_part = after + (row * chunks + chunk) * N_PARTS
            tl.store(to_part, tl.sum(likelier.to(tl.float64), 0))
            tl.store(to_part + 1, tl.sum(weights, 0))
            tl.store(to_part + 2, best_here)
            tl.store(to_part + 3, id_here.to(tl.float64))
            tl.store(to_part + 4, tl.max(tl.where(at == id_here, minus, noisy), 0))


def begin(wanted: Sequence[Draw]) -> torch.Tensor:
    """A token for each, int64 [n] on the device; UNSURE where it is close.

    Rows are of one length and dtype, at temperatures above 0 and without top_k.
    """
    first = wanted[0].row
    n, vocab, device = len(wanted), len(first), first.device
    storages = {w.row.untyped_storage().data_ptr() for w in wanted}
    if len(storages) == 1 and all(w.row.stride(0) == 1 for w in wanted):
        begins = [w.row.storage_offset() for w in wanted]
        logits = min((w.row for w in wanted), key=lambda row: row.storage_offset())
        begins = [at - logits.storage_offset() for at in begins]
    else:
        logits, begins = torch.stack([w.row for w in wanted]), [i * vocab for i in range(n)]
    numbers = array("d")
    for w in wanted:  # 2 and -1 are what no mass and no weight is near
        numbers.extend((0.0, 0.0, w.temperature, w.top_p if w.top_p < 1 else 2.0, w.min_p or -1.0))
    params = torch.frombuffer(numbers, dtype=torch.int64).view(n, N_PARAMS)
    params[:, 0] = torch.tensor(begins)
    params[:, 1] = torch.tensor([w.key - 2**64 if w.key >= 2**63 else w.key for w in wanted])
    params = sent(params, device)
    chunks = triton.cdiv(vocab, CHUNK)
    mass = torch.empty(n, chunks, 2, dtype=torch.float64, device=device)
    parts = torch.empty(ROUNDS + 1, n, chunks, N_PARTS, dtype=torch.float64, device=device)
    state = torch.empty(ROUNDS + 1, n, N_STATE, dtype=torch.float64, device=device)
    found = torch.empty(n, dtype=torch.int64, device=device)
    how = {"num_warps": 8, "enable_fp_fusion": False, **ahead(device)}
    _masses[(chunks, n)](logits, params, mass, vocab, chunks, N_PARAMS=N_PARAMS, CHUNK=CHUNK, **how)
    sizes: dict[str, float] = {"N_PARAMS": N_PARAMS, "N_PARTS": N_PARTS, "N_STATE": N_STATE, "CHUNK": CHUNK}
    sizes |= {"CLOSE": CLOSE, "SMALLEST": SMALLEST, "UNSURE": UNSURE, "CHUNKS": triton.next_power_of_2(chunks)}
    for i in range(ROUNDS + 2):
        kind = (FIRST, SECOND)[i] if i < 2 else LATER if i <= ROUNDS else LAST
        before, after = max(0, i - 1), min(i, ROUNDS)
        _round[(1 if kind == LAST else chunks, n)](
            logits,
            params,
            mass,
            parts[before],
            parts[after],
            state[before],
            state[after],
            found,
            vocab,
            chunks,
            KIND=kind,
            **sizes,
            **how,
        )
    return found
