"""`bench`: how fast a model runs here, beside what the hardware allows and what others reach."""

from __future__ import annotations

from llama_dist.frontend.bench.command import prepare

__all__ = ["prepare"]
