"""launch/Dockerfile: linted, and its instructions followed by hand, since no container engine is needed here."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests import kubelet
from tests.cluster_jobs import ROOT, environment

DOCKERFILE = ROOT / "launch" / "Dockerfile"
CONSTRAINTS = ROOT / "launch" / "constraints.txt"
SCRIPTS = sorted((ROOT / "launch").glob("*.sh"))


def tool(name: str) -> str:
    """A linter of the `test` extra, from this environment or the path."""
    found = shutil.which(name, path=environment()["PATH"])
    if found is None:
        assert os.environ.get("CI") != "true", f"{name} is of the test extra"
        pytest.skip(f"{name} is not installed; it is of the test extra")
    return found


def instructions() -> list[tuple[str, str]]:
    """Each instruction and the rest of its line, lines that go on joined as Docker joins them."""
    kept = [line for line in DOCKERFILE.read_text().splitlines() if not line.startswith("#")]
    text = re.sub(r"\\\n", "", "\n".join(kept))
    return [(word, rest.strip()) for word, _, rest in (line.partition(" ") for line in text.splitlines() if line)]


def pins() -> dict[str, str]:
    lines = [line for line in CONSTRAINTS.read_text().splitlines() if not line.startswith("#")]
    return dict(line.split("==") for line in lines)  # type: ignore[misc]


def test_the_linter_has_nothing_to_say() -> None:
    done = subprocess.run([tool("hadolint"), str(DOCKERFILE)], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, ""), done.stdout + done.stderr


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_shellcheck_has_nothing_to_say(script: Path) -> None:
    words = [tool("shellcheck"), "--shell=bash", "--external-sources", "--source-path=SCRIPTDIR"]
    words += ["--exclude=SC2119", str(script)]  # ready_venv's argument is its own, and optional
    if script.name == "venv.sh":
        words.insert(1, "--exclude=SC2034")  # $python is for those who source it
    done = subprocess.run(words, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout


def test_what_the_linter_does_not_ask() -> None:
    found = instructions()
    (base,) = [rest for word, rest in found if word == "FROM"]
    (user,) = [rest for word, rest in found if word == "USER"]
    (entry,) = [json.loads(rest) for word, rest in found if word == "ENTRYPOINT"]
    assert re.fullmatch(r"python:\d+\.\d+-slim-\w+", base)
    assert int(user) > 0 and entry == ["python", "-m", "llama_dist"]
    for name in ("job.yaml", "job-torchrun.yaml", "leaderworkerset.yaml"):
        assert kubelet.pod_spec(kubelet.workload(name))["securityContext"]["runAsUser"] == int(user)


def test_what_is_copied_is_there_and_not_ignored() -> None:
    kept = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    copied = [word for name, rest in instructions() if name == "COPY" for word in rest.split()[:-1]]
    assert "launch/constraints.txt" in copied and "llama_dist" in copied
    for path in copied:
        assert (ROOT / path).exists() and path.split("/")[0] in kept


def declared() -> list[Requirement]:
    """What the package asks for without extras."""
    found = [Requirement(r) for r in distribution("llama_dist").requires or []]
    return [r for r in found if r.marker is None or r.marker.evaluate({"extra": ""})]


def needed() -> set[str]:
    """All that comes with it, by what is installed here."""
    todo = declared()
    found: set[str] = set()
    while todo:
        requirement = todo.pop()
        name = canonicalize_name(requirement.name)
        if name in found or (requirement.marker and not requirement.marker.evaluate({"extra": ""})):
            continue
        try:
            todo += [Requirement(r) for r in distribution(name).requires or []]
        except PackageNotFoundError:
            continue  # a CUDA build of torch names packages that a CPU build does not bring
        found.add(name)
    return found


def test_every_dependency_is_pinned_and_nothing_else() -> None:
    assert len(declared()) >= 8
    for requirement in declared():
        assert requirement.specifier.contains(pins()[canonicalize_name(requirement.name)]), requirement
    extra = {"pytest", "mypy", "ruff", "hypothesis", "transformers", "matplotlib"}
    assert not extra & pins().keys()
    missing = needed() - pins().keys()
    assert not {name for name in missing if not name.startswith(("nvidia-", "cuda-", "triton"))}, missing


def run_line() -> str:
    """The RUN that installs the package."""
    (found,) = [rest for word, rest in instructions() if word == "RUN" and "pip install" in rest]
    return found


def follow(line: str, folder: Path, device: str, python: str) -> subprocess.CompletedProcess[str]:
    """A RUN line as the SHELL instruction has it, in a folder with what was copied."""
    (shell,) = [json.loads(rest) for word, rest in instructions() if word == "SHELL"]
    env = {**environment(DEVICE=device), "PATH": f"{Path(python).parent}{os.pathsep}{os.environ['PATH']}"}
    env.pop("PYTHONPATH")
    return subprocess.run([*shell, line], cwd=folder, env=env, capture_output=True, text=True, timeout=240)


@pytest.fixture(scope="module")
def copied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the COPY instructions put into the image."""
    folder = tmp_path_factory.mktemp("image")
    for name, rest in instructions():
        if name == "COPY":
            *sources, target = rest.split()
            for source in sources:
                place = folder / target / Path(source).name if target.endswith("/") else folder / target
                place.parent.mkdir(parents=True, exist_ok=True)
                (shutil.copytree if (ROOT / source).is_dir() else shutil.copy)(ROOT / source, place)
    return folder


def test_a_wrong_device_stops_the_build(copied: Path) -> None:
    done = follow(run_line(), copied, "tpu", sys.executable)
    assert done.returncode == 2 and "DEVICE is 'tpu', must be cuda or cpu" in done.stderr


@pytest.mark.slow
def test_the_install_resolves_to_the_pins(copied: Path, tmp_path: Path) -> None:
    """pip follows the RUN line in an empty environment, up to writing files (--dry-run)."""
    if sys.version_info[:2] != (3, 11):
        pytest.skip("the image has Python 3.11; its pins need not fit another")
    python = tmp_path / "venv" / "bin" / "python"
    subprocess.run([sys.executable, "-m", "venv", str(python.parent.parent)], check=True, timeout=60)
    report = tmp_path / "report.json"
    # What an index offers is not the test's business: here the machine's own, so no second one.
    line = run_line().replace("--no-cache-dir", f"--dry-run --quiet --report {report}")
    done = follow(line, copied, "cuda", str(python))
    if done.returncode and "Connection" in done.stderr and os.environ.get("CI") != "true":
        pytest.skip("no package index can be reached")
    assert done.returncode == 0, done.stderr
    chosen = {i["metadata"]["name"]: i["metadata"]["version"] for i in json.loads(report.read_text())["install"]}
    found = {canonicalize_name(name): version.partition("+")[0] for name, version in chosen.items()}
    assert found.pop("llama-dist")
    wanted = {name: version for name, version in found.items() if not name.startswith(("nvidia-", "cuda-", "triton"))}
    assert wanted == {name: pins()[name] for name in wanted}
