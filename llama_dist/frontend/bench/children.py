"""Fresh processes for a measurement: this command again, on so many ranks, or another program's."""

from __future__ import annotations

import ctypes
import dataclasses
import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from llama_dist.config import RunConfig
from llama_dist.errors import LlamaDistError
from llama_dist.frontend.bench.results import Results
from llama_dist.frontend.options import BenchOptions

log = logging.getLogger("llama_dist")
SECONDS = 3600.0  # for a child that hangs
PR_SET_PDEATHSIG = 1
_prctl = ctypes.CDLL(None).prctl


class ChildFailed(LlamaDistError):
    """A child that ended without its results; the message says why, in its own words."""


def words_of(options: BenchOptions, work: Sequence[str]) -> list[str]:
    """The flags for one round of this work on the same model, set up the same way."""
    run = options.run
    words = [f"--shape={options.shape}"] if options.shape is not None else [f"--ckpt_dir={run.ckpt_dir}"]
    for field in dataclasses.fields(RunConfig):
        value = getattr(run, field.name)
        if field.name == "ckpt_dir" or value == field.default:
            continue
        text = f"{value}B" if field.name == "kv_cache_memory" else str(value)
        words.append(f"--{field.name}={text}")
    return [*words, f"--work={','.join(work)}", "--repeats=1"]


def last_words(stderr: str) -> str:
    """Of what a process said, the line that tells most."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    ours = [line for line in lines if line.startswith("llama_dist: error:")]
    told = [line for line in lines if "error" in line.lower() and not line.startswith("File ")]  # of a traceback
    return (ours or told or lines or ["it said nothing"])[-1][:300]


def _die_with_parent() -> None:
    _prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def run_child(command: Sequence[str], env: Mapping[str, str] | None = None) -> str:
    """Its stdout. ChildFailed where it ends otherwise than with 0, or not at all."""
    log.debug("starting %s", " ".join(command))
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=SECONDS,
            preexec_fn=_die_with_parent,
            env={**os.environ, **(env or {})},
        )
    except (OSError, subprocess.TimeoutExpired) as err:
        raise ChildFailed(f"{command[0]}: {err}"[:300]) from None
    if done.returncode:
        raise ChildFailed(refusal(done.stdout) or f"it ended with {done.returncode}: {last_words(done.stderr)}")
    return done.stdout


def told(stdout: str) -> list[dict[str, object]]:
    """What a contender has measured, see contenders/run.py."""
    return [json.loads(line[6:]) for line in stdout.splitlines() if line.startswith("BENCH ")]


def refusal(stdout: str) -> str | None:
    """Why a contender cannot do the work, where it has said so."""
    return next((str(item["refused"]) for item in told(stdout) if "refused" in item), None)


def ourselves(options: BenchOptions, ranks: int, work: Sequence[str]) -> Results:
    """One round of this command on `ranks` ranks of this machine."""
    launcher = [] if ranks == 1 else ["torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks), "-m"]
    with tempfile.TemporaryDirectory(prefix="llama_dist-bench-") as folder:
        path = Path(folder) / "results.json"
        command = [sys.executable, "-m", *launcher, "llama_dist", "bench", *words_of(options, work), f"--json={path}"]
        # Ranks share the threads that one process has here; torchrun's own default is one each.
        env = {} if ranks == 1 else {"OMP_NUM_THREADS": str(max(1, torch.get_num_threads() // ranks))}
        run_child(command, env)
        return Results.from_json(json.loads(path.read_text()))
