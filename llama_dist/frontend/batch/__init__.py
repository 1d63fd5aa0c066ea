"""`batch`: a file of requests in, a file of results out, every line answered exactly once."""

from __future__ import annotations

from llama_dist.frontend.batch.command import prepare

__all__ = ["prepare"]
