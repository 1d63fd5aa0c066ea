"""Runs a function on several ranks: real processes that meet over gloo, with a timeout.

They are forked from a server process that has imported torch already, so a rank starts in a fraction of a second.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any, TypeVar

T = TypeVar("T")
PRELOAD = ["torch", "fairscale.nn.model_parallel.layers", "llama_dist.generation", "tests.spmd"]


class RankFailed(AssertionError):
    """A rank raised, died or hung; `errors[rank]` is its traceback or exit code."""

    def __init__(self, errors: dict[int, str]) -> None:
        super().__init__("\n".join(f"--- rank {r}\n{e}" for r, e in sorted(errors.items())))
        self.errors = errors


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def rank_env(rank: int, size: int, port: int) -> dict[str, str]:
    return {
        "RANK": str(rank),
        "WORLD_SIZE": str(size),
        "LOCAL_RANK": str(rank),
        "LOCAL_WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


def _child(pipe: Connection, env: dict[str, str], fn: Callable[..., Any], args: tuple[Any, ...]) -> None:
    os.environ.update(env)
    import torch

    torch.set_num_threads(1)
    try:
        pipe.send((True, fn(*args)))
    except BaseException:
        pipe.send((False, traceback.format_exc()))
    pipe.close()
    os._exit(0)  # interpreter teardown with live groups can abort


def run_ranks(
    size: int, fn: Callable[..., T], *args: Any, timeout: float = 120, env: dict[str, str] | None = None
) -> list[T]:
    """`fn(*args)` on `size` ranks; what each returned, by rank. RankFailed when one raises, dies or takes too long."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    port = free_port()
    ranks = []
    for rank in range(size):
        ours, theirs = context.Pipe(duplex=False)
        child_env = {**(env or {}), **rank_env(rank, size, port)}
        process = context.Process(target=_child, args=(theirs, child_env, fn, args), daemon=True)
        process.start()
        theirs.close()
        ranks.append((process, ours))
    results: dict[int, T] = {}
    errors: dict[int, str] = {}
    pending = {pipe: rank for rank, (_, pipe) in enumerate(ranks)}
    while pending:
        ready = wait(list(pending), timeout)
        if not ready:
            errors.update(dict.fromkeys(pending.values(), f"no answer within {timeout} s"))
            break
        for pipe in ready:
            rank = pending.pop(pipe)  # type: ignore[call-overload]
            try:
                good, value = pipe.recv()  # type: ignore[union-attr]
            except EOFError:
                ranks[rank][0].join(5)
                good, value = False, f"exit code {ranks[rank][0].exitcode}"
            (results if good else errors)[rank] = value
    for process, _ in ranks:
        process.join(5)
        if process.is_alive():
            process.kill()
    if errors:
        raise RankFailed(errors)
    return [results[r] for r in range(size)]
