"""Run by a Python that has this folder in PYTHONPATH: each step of an engine takes STEP_SECONDS longer.

So a job that a test stops midway is not done before, however fast the machine.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

ENGINE = "llama_dist.engine.engine"


class Paced(MetaPathFinder):
    """Finds the engine's module as usual, and changes it once it is loaded."""

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        spec = PathFinder.find_spec(name, path) if name == ENGINE else None
        if spec is None or spec.loader is None:
            return None
        load = spec.loader.exec_module

        def load_paced(module: ModuleType) -> None:
            load(module)
            step = module.Engine.step

            def paced(*args: Any, **named: Any) -> Any:
                time.sleep(float(os.environ["STEP_SECONDS"]))
                return step(*args, **named)

            module.Engine.step = paced

        spec.loader.exec_module = load_paced  # type: ignore[method-assign]
        return spec


sys.meta_path.insert(0, Paced())
