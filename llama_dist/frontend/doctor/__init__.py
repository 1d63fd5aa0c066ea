"""`doctor`: what is wrong with ranks, hosts, network and files, before a job is given to them."""

from __future__ import annotations

from llama_dist.frontend.doctor.command import prepare

__all__ = ["prepare"]
