"""Rotary position embedding (Su et al. 2021) in the half-rotated order, with Llama 3's, linear and dynamic scaling."""

from __future__ import annotations

import math

import torch

from llama_dist.config import ModelConfig, RopeScaling
from llama_dist.kernels.steady import steady


def _llama3(freqs: torch.Tensor, scaling: RopeScaling) -> torch.Tensor:
    """Llama 3.1's rule: long wavelengths divided by the factor, short ones kept, a ramp between (its model card)."""
    wavelengths = 2 * math.pi / freqs
    turns = scaling.original_max_position / wavelengths
    ramp = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    ramp = ramp.clamp(0, 1)
    return (1 - ramp) * freqs / scaling.factor + ramp * freqs


FIRST = 1024  # positions whose angles are computed when the first is asked for


class Rope:
    """Angles of each position. `lengths` matter to dynamic scaling only.

    Dynamic scaling grows the base with the sequence: a token's angles are those of the length its sequence had when
    the token was computed. That is its prompt's length for a prompt token and its own position + 1 for a later one, so
    they do not depend on how a prompt was cut into chunks (and equal Hugging Face's with one sequence in the batch).
    """

    def __init__(self, config: ModelConfig, device: torch.device) -> None:
        self.theta = config.rope_theta
        self.scaling = config.rope_scaling
        self.exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device=device) / config.head_dim
        freqs = 1.0 / (self.theta**self.exponents)
        if self.scaling is not None and self.scaling.kind == "llama3":
            freqs = _llama3(freqs, self.scaling)
        elif self.scaling is not None and self.scaling.kind == "linear":
            freqs = freqs / self.scaling.factor
        self.freqs = freqs  # [head_dim / 2]
        self._known = self._of(torch.arange(0, device=device), freqs)

    @property
    def dynamic(self) -> bool:
        """Whether angles depend on how long a sequence is."""
        return self.scaling is not None and self.scaling.kind == "dynamic"

    def _dynamic(self, lengths: torch.Tensor) -> torch.Tensor:
        """Frequencies [n, head_dim / 2] for tokens of sequences `lengths` long."""
        scaling = self.scaling
        assert scaling is not None
        beyond = lengths.clamp(min=scaling.original_max_position).float() / scaling.original_max_position
        dim = 2 * len(self.exponents)
        # A length at a time: the last bit of a power may depend on where in a tensor it stands.
        each, which = beyond.unique(return_inverse=True)  # type: ignore[no-untyped-call]
        bases = [
            self.theta * (scaling.factor * x - (scaling.factor - 1)) ** (dim / (dim - 2)) for x in torch.split(each, 1)
        ]
        return torch.stack([1.0 / (base**self.exponents) for base in bases])[which]

    @staticmethod
    def _of(positions: torch.Tensor, freqs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        angles = positions[:, None].float() * freqs
        return steady(torch.cos, angles)[:, None], steady(torch.sin, angles)[:, None]

    def angles(self, positions: torch.Tensor, lengths: torch.Tensor, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin, float32 [n, 1, head_dim / 2], of positions [n], all below `stop`, in sequences of `lengths` [n].

        They are looked up among those of all positions up to the greatest asked for so far.
        """
        if self.dynamic:
            return self._of(positions, self._dynamic(lengths))
        cos, sin = self.known(stop)
        return cos.index_select(0, positions), sin.index_select(0, positions)

    def known(self, stop: int) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin, float32 [at least `stop`, 1, head_dim / 2], of all positions; not for dynamic scaling."""
        assert not self.dynamic, "angles of a position alone"
        if stop > len(self._known[0]):
            positions = torch.arange(max(FIRST, 2 ** (stop - 1).bit_length()), device=self.freqs.device)
            self._known = self._of(positions, self.freqs)
        return self._known
