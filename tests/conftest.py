"""What all tests share: one thread a process, no network for transformers, no deadline for hypothesis's examples, tiny
checkpoints saved once a session.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

# Before the first import of transformers or tokenizers, which read these once.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from hypothesis import HealthCheck, settings

from tests import tiny

torch.set_num_threads(1)
# A busy machine may hold up any example.
settings.register_profile("patient", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("patient")

Saver = Callable[[str, str], Path]


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Saver:
    """`checkpoint(case, form)` saves a tiny checkpoint on first use. Do not change what lies there.

    Forms: hf (transformers 4 config, one file), hf5 (transformers 5 config, three files), meta1, meta2, meta4,
    meta2-llama2 (embedding cut along its width) and so on, gguf-F32, gguf-F16, gguf-Q8_0 and so on.
    """
    root = tmp_path_factory.mktemp("checkpoints")

    def save(name: str, form: str) -> Path:
        case = tiny.CASES[name]
        target = root / f"{name}.{form}"
        kind = form.removesuffix("-llama2")
        if form.startswith("gguf-"):
            path = target / f"{name}.gguf"
            return path if path.exists() else tiny.save_gguf(case, path, form.removeprefix("gguf-"))
        if target.exists():
            return target
        if kind.startswith("meta"):
            return tiny.save_meta(case, target, int(kind.removeprefix("meta")), llama2_embedding=kind != form)
        if form not in ("hf", "hf5"):
            raise ValueError(f"no such form of checkpoint: {form}")
        return tiny.save_hf(case, target, shards=1 if form == "hf" else 3, style=4 if form == "hf" else 5)

    return save


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no CUDA device"))
