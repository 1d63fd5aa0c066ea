"""The floor order of the package, the rules its imports must keep, and proof that the check finds a breach."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "llama_dist"
MAX_LINES = 450

FLOORS = {
    **dict.fromkeys(("errors", "config", "request", "kernels", "quant"), 0),
    **dict.fromkeys(("parallel", "text"), 1),
    "model": 2,
    "checkpoint": 3,
    "engine": 4,
    **dict.fromkeys(("generation", "frontend"), 5),
    **dict.fromkeys(("cli", "flags", "__main__"), 6),
}
ONE_FILE_ROOMS = (0, 6)
"""The files of these floors are one room together: they may import each other."""
NO_TORCH = (
    "text/",
    "parallel/units.py",
    "engine/plan.py",
    "quant/scheme.py",
    "engine/pages.py",
    "engine/scheduler.py",
    "frontend/batch/leases.py",
    "frontend/batch/cards.py",
    "frontend/weights_ahead.py",
    "model/ahead.py",
    "model/host_memory.py",
)
MAY_PICKLE = "checkpoint/"
"""`.pth` files are pickles by definition; nothing else of the package has any business with one."""
OBJECT_COLLECTIVES = {
    f"{verb}_object{kind}"
    for verb in ("all_gather", "gather", "broadcast", "scatter", "send", "recv")
    for kind in ("", "_list")
}
SERIALISERS = {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve"}


def room_of(module: str) -> str | None:
    """`llama_dist.model.rope` -> `model`; None for what is not in a room."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 and parts[0] == "llama_dist" else None


def imports(tree: ast.AST, where: str) -> Iterator[str]:
    """Dotted names a file imports, each `from a import b` as a.b; relative ones made absolute."""
    here = ["llama_dist", *Path(where).with_suffix("").parts]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join([*here[: len(here) - node.level], *([node.module] if node.module else [])])
            start = base if node.level else node.module or ""
            yield from (f"{start}.{alias.name}" for alias in node.names)


def dotted(node: ast.AST) -> str:
    """`torch.distributed.all_reduce` of an attribute chain; empty for anything else."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        inner = dotted(node.value)
        return f"{inner}.{node.attr}" if inner else ""
    return ""


def within(name: str, *packages: str) -> bool:
    return any(name == package or name.startswith(package + ".") for package in packages)


def faults(where: str, source: str) -> list[str]:
    """What a file at `where` (its path in the package) breaks."""
    tree = ast.parse(source)
    found = []
    room = Path(where).parts[0].removesuffix(".py")
    if room not in FLOORS and room != "__init__":
        found.append(f"room {room} is on no floor")
    floor = FLOORS.get(room, max(FLOORS.values()))
    names = list(imports(tree, where))
    for name in names:
        other = room_of(name)
        if other is None or other == room or other not in FLOORS:
            continue
        neighbours = FLOORS[other] == floor and floor in ONE_FILE_ROOMS
        if FLOORS[other] > floor or (FLOORS[other] == floor and not neighbours):
            found.append(f"{room} (floor {floor}) imports {name} (floor {FLOORS[other]})")
    used = names + [text for node in ast.walk(tree) if (text := dotted(node))]
    if room != "parallel":
        found += [f"{name} outside parallel/" for name in used if within(name, "torch.distributed", "fairscale")]
    if where.startswith(NO_TORCH):
        found += [f"imports {name} where torch does not belong" for name in names if within(name, "torch")]
    if not where.startswith(MAY_PICKLE):
        found += [f"names {name}" for name in used if name.split(".")[0] in SERIALISERS]
    found += [f"names {name}" for name in used if name.split(".")[-1] in OBJECT_COLLECTIVES]
    if source.count("\n") > MAX_LINES:
        found.append(f"{source.count(chr(10))} lines, at most {MAX_LINES}")
    return found


def sources() -> list[str]:
    return sorted(str(path.relative_to(PACKAGE)) for path in PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("where", sources())
def test_file_keeps_the_rules(where: str) -> None:
    assert faults(where, (PACKAGE / where).read_text(encoding="utf-8")) == []


def test_no_test_file_is_too_long() -> None:
    long = [path.name for path in Path(__file__).parent.glob("*.py") if path.read_text().count("\n") > MAX_LINES]
    assert long == []


def test_every_room_was_looked_at() -> None:
    rooms = {Path(where).parts[0].removesuffix(".py") for where in sources()}
    assert {"config", "parallel", "text", "model", "checkpoint", "engine"} <= rooms


@pytest.mark.parametrize(
    ("where", "source"),
    [
        ("model/rope.py", "from llama_dist.engine.engine import Engine"),
        ("model/rope.py", "from ..engine import engine"),
        ("model/rope.py", "def f():\n    import llama_dist.checkpoint.load"),
        ("text/stream.py", "from llama_dist.parallel.units import Cut"),
        ("frontend/chat.py", "from llama_dist.generation import Llama"),
        ("config.py", "from llama_dist.parallel import units"),
        ("cellar/wine.py", ""),
        ("engine/engine.py", "import torch.distributed as dist"),
        ("engine/engine.py", "from torch import distributed"),
        ("engine/engine.py", "import torch\ntorch.distributed.barrier()"),
        ("model/attention.py", "from fairscale.nn.model_parallel import initialize"),
        ("text/stream.py", "import torch"),
        ("parallel/units.py", "from torch import Tensor"),
        ("engine/plan.py", "import torch.nn"),
        ("parallel/control.py", "import pickle"),
        ("parallel/control.py", "import torch.distributed as dist\ndist.all_gather_object([], 1)"),
        ("parallel/control.py", "import torch.distributed as dist\ndist.broadcast_object_list([1])"),
        ("parallel/control.py", "from torch.distributed import gather_object"),
        ("model/long.py", "x = 1\n" * (MAX_LINES + 1)),
    ],
)
def test_breaches_are_found(where: str, source: str) -> None:
    assert faults(where, source)


@pytest.mark.parametrize(
    ("where", "source"),
    [
        ("engine/engine.py", "from llama_dist.model.rope import Rope\nfrom llama_dist.parallel import control"),
        ("model/rope.py", "from .norm import Norm\nfrom llama_dist.model.norm import Norm"),
        ("errors.py", "from llama_dist.config import ModelConfig"),
        ("cli.py", "from llama_dist.flags import build"),
        ("parallel/world.py", "import torch.distributed as dist\nimport fairscale"),
        ("checkpoint/meta.py", "import pickle"),
    ],
)
def test_what_is_allowed_passes(where: str, source: str) -> None:
    assert faults(where, source) == []
