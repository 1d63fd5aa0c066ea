"""About how many bytes of weights a command will hold on this rank, by its flags and its files' names and sizes.

A guess, before torch is there to read headers: one too high or too low costs a little time. Nothing is refused here.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from llama_dist.config import RunConfig
from llama_dist.engine.plan import rank_weight_bytes, units_of
from llama_dist.model.host_memory import host_memory, one_node
from llama_dist.model.shapes import SHAPES
from llama_dist.parallel.launch import Launch

LEAST = 2**25  # bytes for which a thread pays
SHARE = 0.5  # of what memory is left, at most: a model that does not fit is to be refused in words
READ = re.compile(r"(?i)model.*\.safetensors|consolidated\.\d+\.pth|.*\.gguf")  # of a directory's files
BITS = re.compile(r"(?i)(?<![a-z0-9])(?:i?q|b?f)(\d+)")  # as GGUF files are called: Q4_K_M, IQ4_XS, BF16
HEAD = 2**12  # bytes of a safetensors file, which begins with what types its tensors have
GPUS = ("/dev/nvidiactl", "/dev/kfd", "/dev/dxg")  # of NVIDIA, of AMD, of either under WSL
BYTES = {"float32": 4.0, "bfloat16": 2.0, "float16": 2.0, "int8": 1.0, "int4": 0.75, "fp8": 1.0}  # of a number, about


def numbers_in(path: Path) -> tuple[float, float]:
    """About how many numbers a checkpoint has, and how many bytes each takes where `--dtype auto` decides on a CPU."""
    try:
        found_here = [entry for entry in path.iterdir() if READ.fullmatch(entry.name)] if path.is_dir() else [path]
        files = [file for file in found_here if file.is_file()]  # to open a pipe would be to wait
        size = sum(file.stat().st_size for file in files)
        if files and files[0].suffix == ".safetensors":
            with files[0].open("rb") as file:
                kind, bits = ("f32", 32) if b'"F32"' in file.read(HEAD) else ("bf16", 16)
        else:
            found = BITS.search(files[0].name) if files else None
            kind, bits = (found[0].lower(), max(1, int(found[1]))) if found else ("bf16", 16)
    except OSError:  # which is told where the checkpoint is opened
        return 0.0, 0.0
    if "q" in kind:
        bits += 1  # scales, and tensors that are kept wider
    return 8 * size / bits, 2.0 if kind == "bf16" else 4.0


def bytes_ahead(run: RunConfig, shape: str | None, launch: Launch) -> int:
    """Bytes that are worth touching early, of files or of a named shape; 0 where the weights go to a GPU, where it
    counts which thread touches them, or where they take most of the memory that is left.
    """
    if run.device == "cuda" or (run.device == "auto" and any(map(os.path.exists, GPUS))) or not one_node():
        return 0
    ranks = run.model_parallel_size or launch.size
    if shape is not None:
        config, each = SHAPES[shape], 4 if run.dtype == "float32" else 2
        size = max(rank_weight_bytes(config, units_of(config, ranks, run.units), ranks, each, run.quantization))
    else:
        numbers, each_of_auto = numbers_in(Path(run.ckpt_dir))
        size = int(numbers * BYTES.get(run.quantization or run.dtype, each_of_auto)) // ranks
    return size if LEAST <= size <= SHARE * host_memory() / max(1, launch.local_size) else 0
