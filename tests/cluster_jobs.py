"""A batch job on a tiny checkpoint that launchers start, break and start again until its file is whole."""

from __future__ import annotations

import json
import os
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.fault_ranks import run_command

ROOT = Path(__file__).resolve().parent.parent
LINES = 120  # so many that a fast machine takes seconds, and there is time to break the job


class Job:
    """`flags` are the words after `python -m llama_dist`."""

    def __init__(self, checkpoint: Path, folder: Path, timeout: float = 60, *more: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.output = folder, folder / "out.jsonl"
        source, dice = folder / "in.jsonl", random.Random(7)
        with source.open("w") as f:
            for i in range(LINES):
                line = {"custom_id": f"c{i}", "prompt": "to be or not " * dice.randint(1, 3), "max_tokens": 24}
                f.write(json.dumps({**line, "ignore_eos": True, "seed": i, "temperature": i % 2}) + "\n")
        files = [f"--ckpt_dir={checkpoint}", f"--input_file={source}", f"--output_file={self.output}"]
        sizes = ["--max_seq_len=96", "--max_batch_size=4", "--dtype=float32", "--device=cpu"]
        self.flags = ["batch", *files, *sizes, f"--timeout={timeout}", "--grace=10", *more]

    def plain(self, world: int) -> list[str]:
        """The results of an undisturbed run on `world` ranks of this host."""
        ended = run_command(world, self.flags, self.folder)
        assert ended.codes == [0] * world, ended.log
        return self.results()

    def results(self) -> list[str]:
        return sorted(self.output.read_text().splitlines())

    def texts(self) -> dict[str, str]:
        return texts(self.results())

    def status(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(Path(f"{self.output}.status.json").read_text())
        return found

    def wait_for_results(self, alive: Callable[[], bool], within: float = 60) -> int:
        """Until some lines are answered; how many, and there must be others still. Fails if the ranks end before."""
        began = time.monotonic()
        while not (self.output.exists() and self.output.read_bytes().count(b"\n") > 2):
            assert alive(), "the ranks ended before the first results"
            assert time.monotonic() - began < within, f"no results within {within} s"
            time.sleep(0.02)
        found = self.output.read_bytes().count(b"\n")
        assert found < LINES, "the job is over before it could be disturbed"
        return found

    def check_whole(self, plain: list[str]) -> None:
        assert self.results() == plain
        assert self.status()["state"] == "completed" and self.status()["done"] == LINES


def texts(results: list[str]) -> dict[str, str]:
    """The text that answers each line; every line must have exactly one."""
    records = [json.loads(line) for line in results]
    found = {r["custom_id"]: r["response"]["body"]["choices"][0]["text"] for r in records}
    assert len(found) == len(records) == LINES
    return found


def environment(**more: str) -> dict[str, str]:
    """For a launcher: this Python first on the path, this working tree, nothing of a launcher around the tests."""
    foreign = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "LOCAL_ADDR")
    env = {k: v for k, v in os.environ.items() if k not in foreign and not k.startswith(("GLOO_", "NCCL_", "PET_"))}
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return {**env, "PATH": path, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **more}


def paced(seconds: float) -> dict[str, str]:
    """The environment in which each step takes `seconds` longer, on a machine of any speed: to be stopped midway."""
    return {"PYTHONPATH": f"{ROOT / 'tests' / 'paced'}{os.pathsep}{ROOT}", "STEP_SECONDS": str(seconds)}


def errors(log: str) -> list[str]:
    return [line for line in log.splitlines() if line.startswith("llama_dist: error:")]
