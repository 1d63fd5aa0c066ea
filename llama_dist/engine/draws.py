"""A token for each of several rows: those of `sampler.sample`, by faster ways that leave to it what is close."""

from __future__ import annotations

from collections.abc import Sequence

from llama_dist.engine.device_draws import draw_rows
from llama_dist.engine.sampler import Wanted, noise_key, sample
from llama_dist.kernels.draw import UNSURE, Draw, draw


def draw_all(wanted: Sequence[Wanted]) -> list[int]:
    """The token of each; all rows are of one length and on one device."""
    found = [UNSURE] * len(wanted)
    if wanted and wanted[0].row.device.type == "cpu":
        found = compiled_draw(wanted)
    elif warm := [i for i, w in enumerate(wanted) if w.params.temperature > 0]:
        for i, token in zip(warm, draw_rows([wanted[i] for i in warm]), strict=True):
            found[i] = token
    return [sample(w.row.float(), *w[1:]) if token == UNSURE else token for w, token in zip(wanted, found, strict=True)]


def compiled_draw(wanted: Sequence[Wanted]) -> list[int]:
    """`draw_all` in C++; UNSURE where it is close, or there is no C++ for it."""

    def packed(w: Wanted) -> Draw:
        p = w.params
        return Draw(w.row, noise_key(w.seed, w.position), p.temperature, p.top_p, p.top_k, p.min_p)

    return draw([packed(w) for w in wanted])
