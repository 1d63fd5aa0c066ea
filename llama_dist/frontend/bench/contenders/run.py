"""Runs one contender's work in its own Python: `python run.py CONTENDER.py SPEC.json`. Standard library only.

A contender is a file beside this one with `load(spec)`, which gets ready and returns a line about itself, and
`generate(prompts, n, temperature, top_p)`, which returns exactly n new ids for each prompt (ids too), whatever they
are. Where it has `make_room(prompts, n)` too, that is called before, untimed. What was measured goes to stdout, a line
`BENCH {json}` each; everything else that is printed is passed over.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import time
import traceback
from typing import Any

REFUSED = 3  # the exit code of a contender that cannot do this work, which has said why


def since_start() -> float:
    """Seconds since the kernel started this process."""
    with open("/proc/self/stat") as file:
        fields = file.read().rpartition(")")[2].split()
    return time.clock_gettime(time.CLOCK_BOOTTIME) - int(fields[19]) / os.sysconf("SC_CLK_TCK")


def peak_host() -> int:
    """The most bytes of memory this process has had resident."""
    with open("/proc/self/status") as file:
        line = next(line for line in file if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024


def tell(**values: Any) -> None:
    print("BENCH " + json.dumps(values), flush=True)


def load_file(path: str) -> Any:
    """A module from a file, whatever else is called so."""
    spec = importlib.util.spec_from_file_location("contender", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["contender"] = module
    spec.loader.exec_module(module)
    return module


def timed(contender: Any, prompts: list[list[int]], new: int, temperature: float, top_p: float) -> float:
    """Seconds of one call, whose answers must be there."""
    began = time.perf_counter()
    answers = contender.generate(prompts, new, temperature, top_p)
    seconds = time.perf_counter() - began
    lengths = [len(answer) for answer in answers]
    if lengths != [new] * len(prompts):
        raise ValueError(f"asked for {len(prompts)} answers of {new} tokens, got lengths {lengths}")
    return seconds


def measure(contender: Any, job: dict[str, Any]) -> float:
    """Tokens a second: of answers alone (decode), of a prompt (prefill), or of new tokens in a whole batch."""
    prompts: list[list[int]] = job["prompts"]
    new: int = job["new"]

    def seconds(n: int) -> float:
        return timed(contender, prompts, n, job["temperature"], job["top_p"])

    if hasattr(contender, "make_room"):
        contender.make_room(prompts, new + 1)
    if job["name"] in ("decode", "sampled"):  # what a step adds, whatever comes before the first
        seconds(2)
        first = seconds(1)
        return len(prompts) * new / (seconds(new + 1) - first)
    if job["name"] == "prefill":
        return sum(map(len, prompts)) / seconds(1)
    return len(prompts) * new / seconds(new)


def main() -> int:
    path, spec_path = sys.argv[1:]
    sys.path.pop(0)  # this folder's names are no top-level ones
    with open(spec_path) as file:
        spec = json.load(file)
    try:
        contender = load_file(path)
        tell(about=contender.load(spec))
        tell(name="ready", size=0, value=since_start())
        timed(contender, [spec["first"]], 1, 0.0, 1.0)
        tell(name="first token", size=0, value=since_start())
        for job in spec["jobs"]:
            rate = measure(contender, job)
            if rate > 0:  # a machine that stumbles at the wrong moment tells nothing
                tell(name=job["name"], size=job["size"], value=rate)
        tell(name="host memory", size=0, value=peak_host())
    except Exception as err:
        traceback.print_exc()
        tell(refused=" ".join(f"{type(err).__name__}: {err}".split())[:300])
        return REFUSED
    return 0


if __name__ == "__main__":
    sys.exit(main())
