"""Which rank this process is, from what its launcher put in the environment. No torch."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass

from llama_dist.errors import ConfigError


@dataclass(frozen=True)
class Launch:
    """This process's place among the others, and where rank 0 keeps the store they meet at.

    `launcher`: torchrun, srun, kubernetes, leaderworkerset or alone. `agent_store`: torchrun's agent hosts the store,
    not rank 0. `attempt` of `max_restarts`: how often torchrun has started these ranks again.
    """

    launcher: str
    rank: int
    size: int
    local_rank: int
    local_size: int
    host: str
    port: int
    attempt: int = 0
    agent_store: bool = False
    max_restarts: int = 0


def _number(env: Mapping[str, str], name: str, default: int | None = None) -> int:
    text = env.get(name)
    if text is None and default is not None:
        return default
    try:
        value = int(text or "")
    except ValueError:
        raise ConfigError(f"the launcher set {name}={text!r}, must be a whole number") from None
    if value < 0:
        raise ConfigError(f"the launcher set {name}={value}, must be 0 or more")
    return value


def first_host(nodelist: str) -> str:
    """The first host of a Slurm node list: `gpu[07-09,12],login` gives `gpu07`."""
    found = re.match(r"([^\[,]+)(?:\[([^\],-]+)[^\]]*\]([^,]*))?", nodelist)
    if not found:
        raise ConfigError(f"SLURM_STEP_NODELIST is {nodelist!r}, no host in it; set MASTER_ADDR")
    prefix, number, suffix = found.groups()
    return prefix + (number or "") + (suffix or "")


def _srun(env: Mapping[str, str]) -> Launch | None:
    # Inside sbatch's own script the task variables are set too, but no step was launched: that is one process, alone.
    in_step = "SLURM_STEP_ID" in env or "SLURM_JOB_ID" not in env
    if "SLURM_PROCID" not in env or "SLURM_NTASKS" not in env or not in_step:
        return None
    size = _number(env, "SLURM_STEP_NUM_TASKS", _number(env, "SLURM_NTASKS"))
    nodes = _number(env, "SLURM_STEP_NUM_NODES", _number(env, "SLURM_NNODES", 1))
    tasks = re.match(r"\d+", env.get("SLURM_STEP_TASKS_PER_NODE", env.get("SLURM_TASKS_PER_NODE", "")))
    nodelist = env.get("SLURM_STEP_NODELIST", env.get("SLURM_NODELIST", ""))
    host = env.get("MASTER_ADDR") or (first_host(nodelist) if nodes > 1 else "127.0.0.1")
    job = _number(env, "SLURM_JOB_ID", 0) * 7 + _number(env, "SLURM_STEP_ID", 0)
    return Launch(
        "srun",
        _number(env, "SLURM_PROCID"),
        size,
        _number(env, "SLURM_LOCALID", 0),
        int(tasks.group()) if tasks else -(-size // nodes),
        host,
        _number(env, "MASTER_PORT", 20000 + job % 20000),
    )


def _pod(env: Mapping[str, str]) -> Launch | None:
    """One rank a pod: of a LeaderWorkerSet, or of an Indexed Job whose manifest sets WORLD_SIZE and MASTER_ADDR."""
    if "LWS_WORKER_INDEX" in env and "LWS_GROUP_SIZE" in env:
        names = ("LWS_WORKER_INDEX", "LWS_GROUP_SIZE", "LWS_LEADER_ADDRESS")
        launcher = "leaderworkerset"
    elif "JOB_COMPLETION_INDEX" in env and "WORLD_SIZE" in env:
        names = ("JOB_COMPLETION_INDEX", "WORLD_SIZE", "MASTER_ADDR")
        launcher = "kubernetes"
    else:
        return None
    rank, size, host = _number(env, names[0]), _number(env, names[1]), env.get(names[2])
    if not host and size > 1:
        raise ConfigError(f"{names[1]} is {size} but {names[2]} is not set; set it to the address of rank 0's pod")
    return Launch(launcher, rank, size, 0, 1, host or "127.0.0.1", _number(env, "MASTER_PORT", 29500))


def check_launch(launch: Launch) -> None:
    """ConfigError where the ranks were started in a way that cannot work.

    torchrun's agents on several nodes count restarts each for itself, and ranks find each other by that count. When a
    whole node dies, those left wait for it without starting any rank, also when it is back (tried: over a minute).
    """
    if launch.max_restarts and launch.local_size < launch.size:
        raise ConfigError(
            f"--max-restarts {launch.max_restarts} works on one node only: of several, those that are left wait "
            "for a lost one; leave it out and run the same command again, `batch` goes on where it stopped"
        )


def read_launch(env: Mapping[str, str] = os.environ) -> Launch:
    """torchrun's variables first, then srun's, then Kubernetes', else a world of one."""
    if "RANK" in env and "WORLD_SIZE" in env:
        size = _number(env, "WORLD_SIZE")
        found: Launch | None = Launch(
            "torchrun",
            _number(env, "RANK"),
            size,
            _number(env, "LOCAL_RANK", _number(env, "RANK")),
            _number(env, "LOCAL_WORLD_SIZE", size),
            env.get("MASTER_ADDR", "127.0.0.1"),
            _number(env, "MASTER_PORT", 29500),
            _number(env, "TORCHELASTIC_RESTART_COUNT", 0),
            env.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
            _number(env, "TORCHELASTIC_MAX_RESTARTS", 0),
        )
    else:
        found = _srun(env) or _pod(env)
    if found is None:
        return Launch("alone", 0, 1, 0, 1, "127.0.0.1", 0)
    if found.rank >= found.size:
        raise ConfigError(f"the launcher says rank {found.rank} of {found.size} ranks, ranks count from 0")
    return found
