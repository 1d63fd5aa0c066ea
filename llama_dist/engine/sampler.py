"""Drawing the next token. Noise is a hash of (seed, position, token id): no generator, nothing to keep in step.

Filters in order, after penalties and biases (logits.py): temperature, top_k, top_p, min_p. `top_p` keeps the smallest
set whose mass reaches p: a token stays while the mass before it is at most p (Holtzman et al. 2019, as Llama's
`sample_top_p` has it); the mass is that of what top_k kept. `min_p` keeps tokens at least that share as likely as the
likeliest (Nguyen et al. 2024). The draw is the argmax of logits / temperature + Gumbel noise over what is kept, which
samples the renormalised softmax (Gumbel-max).
"""

from __future__ import annotations

import hashlib
from typing import NamedTuple

import torch

from llama_dist.kernels.program import Chance
from llama_dist.kernels.steady import steady
from llama_dist.request import SamplingParams

GOLDEN = 0x9E3779B97F4A7C15
MIX_1 = 0xBF58476D1CE4E5B9
MIX_2 = 0x94D049BB133111EB
MASK = 2**64 - 1
HEAD = 1024  # the nucleus is looked for among so many likeliest tokens before the whole vocabulary is sorted


def derive_seed(run_seed: int, request_id: str) -> int:
    """The seed (63 bits) of a request that names none."""
    digest = hashlib.blake2b(f"{run_seed}/{request_id}".encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def mix(x: int) -> int:
    """The finaliser of splitmix64 (Steele, Lea and Flood 2014) on the low 64 bits of x."""
    x &= MASK
    x = ((x ^ (x >> 30)) * MIX_1) & MASK
    x = ((x ^ (x >> 27)) * MIX_2) & MASK
    return x ^ (x >> 31)


def signed(x: int) -> int:
    """The int64 that has the 64 bits of x."""
    return x - 2**64 if x >= 2**63 else x


def _shift(x: torch.Tensor, n: int) -> torch.Tensor:
    """Logical right shift of int64, whose own shift is arithmetic."""
    return (x >> n) & ((1 << (64 - n)) - 1)


def _mix(x: torch.Tensor) -> torch.Tensor:
    """`mix` of int64 tensors; products wrap around."""
    x = (x ^ _shift(x, 30)) * signed(MIX_1)
    x = (x ^ _shift(x, 27)) * signed(MIX_2)
    return x ^ _shift(x, 31)


def noise_key(seed: int, position: int) -> int:
    """What the noise of a position is a hash of, beside the token's id: 64 bits, unsigned."""
    return mix(mix(seed + GOLDEN) + GOLDEN * (position + 1))


def chance(params: SamplingParams, seed: int) -> Chance:
    """What is drawn of a sequence's rows, whatever their position."""
    return Chance(mix(seed + GOLDEN), params.top_k, params.temperature, params.top_p, params.min_p)


def gumbel(seed: int, position: int, ids: torch.Tensor) -> torch.Tensor:
    """Gumbel noise, float64, of token `ids` at a sequence position: the same wherever and whenever it is asked for."""
    return gumbel_of(torch.tensor(signed(noise_key(seed, position)), device=ids.device), ids)


def gumbel_of(keys: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """The noise for the bits of `noise_key`s, int64, and token ids; shapes broadcast."""
    bits = _shift(_mix((ids + 1) * signed(GOLDEN) + keys), 11)  # 53 of them
    return -steady(torch.log, -steady(torch.log, (bits.double() + 0.5) * 2.0**-53))


def _by_probability(probs: torch.Tensor, ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Both sorted by falling probability, ties by rising id."""
    ids, order = ids.sort()
    probs, rank = probs[order].sort(descending=True, stable=True)
    return probs, ids[rank]


def _ranked(scaled: torch.Tensor, most: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Probabilities and ids of a row, likeliest first, ties by rising id: all of them, or at least the first `most`."""
    probs = torch.softmax(scaled, dim=-1)
    if most < len(probs):
        head_probs, head_ids = _by_probability(*probs.topk(most + 1))
        # Ties go by id over the whole row: cut where the order is certain.
        certain = int((head_probs > head_probs[-1]).sum())
        if certain >= most:
            return head_probs[:most], head_ids[:most]
    return _by_probability(probs, torch.arange(len(probs), device=probs.device))


def _before(probs: torch.Tensor) -> torch.Tensor:
    """The sum of the probabilities before each, on the CPU: a GPU adds in another order every time."""
    probs = probs.cpu()
    return probs.cumsum(0) - probs


def nucleus(scaled: torch.Tensor, top_p: float) -> torch.Tensor:
    """The ids that `top_p` keeps of one row of logits [vocab] (float64, temperature applied), likeliest first."""
    probs, ids = _ranked(scaled, HEAD)
    stays = _before(probs) <= top_p
    kept = int(stays.sum())
    if kept == len(probs) < len(scaled):  # the head is not enough
        return nucleus_of(*_ranked(scaled, len(scaled)), top_p)
    return ids[:kept]


def nucleus_of(probs: torch.Tensor, ids: torch.Tensor, top_p: float) -> torch.Tensor:
    """`nucleus` of ranked probabilities that need not sum to 1 before it."""
    return ids[: int((_before(probs) <= top_p).sum())]


def candidates(scaled: torch.Tensor, top_k: int, top_p: float, min_p: float) -> torch.Tensor:
    """The ids, rising, that may be drawn from a row of logits [vocab] (float64, temperature applied)."""
    if 0 < top_k < len(scaled):
        probs, ids = _ranked(scaled, top_k)
        probs, ids = probs[:top_k], ids[:top_k]
        if top_p < 1:
            ids = nucleus_of(probs / probs.sum(), ids, top_p)
    elif top_p < 1:
        ids = nucleus(scaled, top_p)
    else:
        ids = torch.arange(len(scaled), device=scaled.device)
    if min_p > 0:
        ids = ids[steady(torch.exp, scaled[ids] - scaled.max()) >= min_p]
    return ids.sort().values


def sample_top_p(
    logits: torch.Tensor,
    temperature: float,
    top_p: float,
    seed: int,
    position: int,
    top_k: int = 0,
    min_p: float = 0.0,
) -> int:
    """One token from one row of logits [vocab] at a temperature above 0."""
    scaled = logits.double() / temperature
    ids = candidates(scaled, top_k, top_p, min_p)
    # argmax gives the first of equals, and ids rise: ties go to the lowest
    return int(ids[torch.argmax(scaled[ids] + gumbel(seed, position, ids))])


def sample(logits: torch.Tensor, params: SamplingParams, seed: int, position: int) -> int:
    """The token at `position` for one row of logits [vocab]: greedy at temperature 0, ties to the lowest id."""
    if params.temperature == 0:
        return int(torch.argmax(logits))
    return sample_top_p(logits, params.temperature, params.top_p, seed, position, params.top_k, params.min_p)


class Wanted(NamedTuple):
    """A token for `position` of a sequence, from its row of logits [vocab]: what `sample` takes."""

    row: torch.Tensor
    params: SamplingParams
    seed: int
    position: int
