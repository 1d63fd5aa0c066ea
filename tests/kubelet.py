"""What Kubernetes makes of a manifest for one pod: the environment and the command of its container."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

FOLDER = Path(__file__).resolve().parent.parent / "launch" / "kubernetes"


def documents(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((FOLDER / name).read_text()))


def workload(name: str) -> dict[str, Any]:
    """The Job or LeaderWorkerSet of a manifest."""
    (found,) = [d for d in documents(name) if d["kind"] in ("Job", "LeaderWorkerSet")]
    return found


def pod_spec(found: Mapping[str, Any]) -> dict[str, Any]:
    spec = found["spec"]
    template = spec["template"] if found["kind"] == "Job" else spec["leaderWorkerTemplate"]["workerTemplate"]
    result: dict[str, Any] = template["spec"]
    return result


def n_pods(found: Mapping[str, Any]) -> int:
    spec = found["spec"]
    return int(spec["completions"] if found["kind"] == "Job" else spec["leaderWorkerTemplate"]["size"])


def expand(text: str, env: Mapping[str, str]) -> str:
    """$(NAME) becomes its value where NAME is known and stays otherwise; $$(NAME) is $(NAME)."""
    return re.sub(
        r"\$\$|\$\(([A-Za-z_][A-Za-z0-9_]*)\)",
        lambda m: "$" if m[1] is None else env.get(m[1], m[0]),
        text,
    )


@dataclass(frozen=True)
class Container:
    command: list[str]
    env: dict[str, str]
    probes: dict[str, list[str]]


def container(found: Mapping[str, Any], index: int, changed: Mapping[str, str] | None = None) -> Container:
    """The container of pod `index`. `changed` values stand in the manifest's env as if typed there.

    The Job controller puts JOB_COMPLETION_INDEX behind the manifest's variables; LeaderWorkerSet puts its own before.
    """
    (spec,) = pod_spec(found)["containers"]
    name = found["metadata"]["name"]
    env: dict[str, str] = {}
    if found["kind"] == "LeaderWorkerSet":
        env["LWS_LEADER_ADDRESS"] = f"{name}-0.{name}.default"
        env["LWS_GROUP_SIZE"] = str(n_pods(found))
        env["LWS_WORKER_INDEX"] = str(index)
    for variable in spec["env"]:
        env[variable["name"]] = expand((changed or {}).get(variable["name"], variable["value"]), env)
    if found["kind"] == "Job":
        env["JOB_COMPLETION_INDEX"] = str(index)
    words = [expand(word, env) for word in [*spec["command"], *spec["args"]]]
    probes = {k: spec[k]["exec"]["command"] for k in ("startupProbe", "livenessProbe", "readinessProbe")}
    return Container(words, env, probes)


def verdict(found: Mapping[str, Any], code: int) -> str:
    """What the Job's podFailurePolicy does about a container's exit code: the first rule that fits, else Count."""
    for rule in found["spec"]["podFailurePolicy"]["rules"]:
        if "onExitCodes" in rule and (code in rule["onExitCodes"]["values"]) == (
            rule["onExitCodes"]["operator"] == "In"
        ):
            return str(rule["action"])
    return "Count"
