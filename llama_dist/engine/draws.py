"""A token for each of several rows: those of `sampler.sample`, by faster ways that leave to it what is close."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from llama_dist.engine.device_draws import draw_rows
from llama_dist.engine.sampler import Wanted, noise_key, sample
from llama_dist.kernels import triton_here
from llama_dist.kernels.draw import UNSURE, Draw, draw
from llama_dist.kernels.told import Told


@dataclass(frozen=True)
class Drawing:
    """Tokens of `n` rows on their way: of `parts`, each some of the rows; the others are left to the sampler."""

    n: int
    parts: list[tuple[list[int], Told]]

    @property
    def whole(self) -> bool:
        """Whether none is left to the sampler from the start."""
        return sum(len(rows) for rows, _ in self.parts) == self.n

    def wait(self) -> list[int]:
        """The tokens, UNSURE where they are left to the sampler."""
        found = [UNSURE] * self.n
        for rows, told in self.parts:
            for i, token in zip(rows, told.tolist(), strict=True):
                found[i] = token
        return found


def draw_all(wanted: Sequence[Wanted]) -> list[int]:
    """The token of each; all rows are of one length and on one device."""
    return [settle(w, token) for w, token in zip(wanted, begin(wanted).wait(), strict=True)]


def settle(wanted: Wanted, token: int) -> int:
    """A token from a Drawing, or the sampler's where it is left to that."""
    return sample(wanted.row.float(), *wanted[1:]) if token == UNSURE else token


def begin(wanted: Sequence[Wanted]) -> Drawing:
    """Have a GPU draw a token for each while the host goes on; on a CPU they are drawn here."""
    if wanted and wanted[0].row.device.type == "cpu":
        return Drawing(len(wanted), [([*range(len(wanted))], Told(torch.tensor(compiled_draw(wanted))))])
    groups: dict[object, list[int]] = {}  # by how they are drawn
    for i, w in enumerate(wanted):
        if w.params.temperature > 0:
            kernel = not 0 < w.params.top_k < len(w.row) and triton_here.serves(w.row)
            groups.setdefault(w.row.dtype if kernel else None, []).append(i)
    last_waits = sorted(groups.items(), key=lambda group: group[0] is None)
    parts = [(some, (begin_triton, draw_rows)[key is None]([wanted[i] for i in some])) for key, some in last_waits]
    return Drawing(len(wanted), [(some, Told(tokens)) for some, tokens in parts])


def begin_triton(wanted: Sequence[Wanted]) -> torch.Tensor:
    """A token for each in Triton, int64 [n] on the device, of rows of one dtype without top_k; UNSURE where close."""
    from llama_dist.kernels import triton_draw

    return triton_draw.begin(packed(wanted))


def packed(wanted: Sequence[Wanted]) -> list[Draw]:
    """As the kernels take them."""
    return [
        Draw(w.row, noise_key(w.seed, w.position), w.params.temperature, w.params.top_p, w.params.top_k, w.params.min_p)
        for w in wanted
    ]


def compiled_draw(wanted: Sequence[Wanted]) -> list[int]:
    """Tokens in C++; UNSURE where it is close, or there is no C++ for it."""
    return draw(packed(wanted))
