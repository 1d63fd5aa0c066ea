"""launch/kubernetes: checked against the published schemas, and run as pods would be, on namespaces with pods' names.

Not checked: the LeaderWorkerSet's own fields (no schema of it is on PyPI; its pod template is checked as a Pod), and
whatever a real cluster does beyond setting environment, command, names and probes.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import kubernetes_validate
import pytest

from llama_dist.errors import ConfigError
from llama_dist.parallel.launch import Launch, read_launch
from tests import kubelet, netns
from tests.cluster_jobs import ROOT, Job, environment, paced
from tests.conftest import Saver

MANIFESTS = ("job.yaml", "job-torchrun.yaml", "leaderworkerset.yaml")
VERSIONS = ("1.31", "1.37")


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("name", MANIFESTS)
def test_manifests_follow_the_schemas(name: str, version: str) -> None:
    for document in kubelet.documents(name):
        if document["kind"] == "LeaderWorkerSet":
            spec = {**kubelet.pod_spec(document), "restartPolicy": "Always"}
            document = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "of-a-group"}, "spec": spec}
        kubernetes_validate.validate(document, version, strict=True)


def test_the_schemas_would_notice() -> None:
    found = kubelet.workload("job.yaml")
    found["spec"]["template"]["spec"]["containers"][0]["imagePullPolice"] = "Always"
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(found, VERSIONS[0], strict=True)


@pytest.mark.parametrize("name", ["job.yaml", "job-torchrun.yaml"])
def test_numbers_and_names_of_a_job_agree(name: str) -> None:
    service, found = kubelet.documents(name)
    spec, pod = found["spec"], kubelet.pod_spec(found)
    job, subdomain = found["metadata"]["name"], pod["subdomain"]
    assert subdomain == service["metadata"]["name"] and service["spec"]["clusterIP"] == "None"
    assert service["spec"]["selector"] == {"batch.kubernetes.io/job-name": job}
    assert service["spec"]["publishNotReadyAddresses"] is True
    env = kubelet.container(found, 1).env
    assert spec["completions"] == spec["parallelism"] == int(env.get("WORLD_SIZE") or env["NODES"])
    first = f"{job}-0.{subdomain}"
    assert first == env.get("MASTER_ADDR") or f"--head={first}:29500" in kubelet.container(found, 1).command
    gpus = pod["containers"][0]["resources"]["limits"]["nvidia.com/gpu"]
    assert gpus == int(env.get("GPUS", 1))
    (grace,) = [int(w.partition("=")[2]) for w in pod["containers"][0]["args"] if w.startswith("--grace=")]
    assert grace + 10 <= pod["terminationGracePeriodSeconds"] and (grace < 30 or name == "job.yaml")
    assert (spec["completionMode"], pod["restartPolicy"]) == ("Indexed", "Never")
    verdicts = [kubelet.verdict(found, code) for code in (1, 2, 75, 137)]
    assert verdicts == ["Count", "FailJob", "Ignore", "Count"]


def test_a_pod_s_place_is_read_from_what_kubernetes_sets() -> None:
    job = kubelet.container(kubelet.workload("job.yaml"), 1).env
    assert read_launch(job) == Launch("kubernetes", 1, 2, 0, 1, "llama-batch-0.llama-batch", 29500)
    group = kubelet.container(kubelet.workload("leaderworkerset.yaml"), 1).env
    assert read_launch(group) == Launch("leaderworkerset", 1, 2, 0, 1, "llama-batch-0.llama-batch.default", 29500)
    # In a pod of torchrun's the ranks have both; without a number of ranks a pod of an Indexed Job is alone.
    torchrun = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "x"}
    assert read_launch({**job, **torchrun}).launcher == "torchrun"
    assert read_launch({"JOB_COMPLETION_INDEX": "1"}).launcher == "alone"


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"MASTER_ADDR": ""}, "WORLD_SIZE is 2 but MASTER_ADDR is not set"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE='two', must be a whole number"),
        ({"JOB_COMPLETION_INDEX": "2"}, "rank 2 of 2 ranks, ranks count from 0"),
    ],
)
def test_wrong_manifests_are_refused(wrong: dict[str, str], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        read_launch({**kubelet.container(kubelet.workload("job.yaml"), 0).env, **wrong})


class Pods:
    """A manifest's pods on nodes with their names. The volume is the job's folder, the image this environment."""

    def __init__(self, name: str, nodes: netns.Nodes, job: Job, **changed: str) -> None:
        self.found, self.nodes, self.job = kubelet.workload(name), nodes, job
        self.pods = [kubelet.container(self.found, i, changed) for i in range(kubelet.n_pods(self.found))]

    def _here(self, words: list[str], index: int) -> list[str]:
        places = {"/data": str(self.job.folder), "/opt/llama_dist": str(ROOT)}
        places["/tmp/started"] = str(self.job.folder / f"started-{index}")
        for there, here in places.items():
            words = [word.replace(there, here) for word in words]
        return words

    def _env(self, index: int) -> dict[str, str]:
        env = self.pods[index].env
        return environment(**dict(zip(env, self._here(list(env.values()), index), strict=True)))

    def start(self, step_seconds: float = 0.0) -> list[subprocess.Popen[str]]:
        small = [f for f in self.job.flags if f.startswith(("--max_", "--dtype", "--device"))]
        started = []
        for i, pod in enumerate(self.pods):
            (self.job.folder / f"started-{i}").unlink(missing_ok=True)  # a new container has a /tmp of its own
            command = [*self._here(pod.command, i), *small]
            env = {**self._env(i), **paced(step_seconds)}
            started.append(self.nodes.start(i, command, self.log(i), env, append=False))
        return started

    def log(self, index: int) -> Path:
        return self.job.folder / f"log-{index}"

    def logs(self) -> str:
        return "\n".join(self.log(i).read_text() for i in range(len(self.pods)))

    def probe(self, kind: str, index: int) -> bool:
        command = self._here(self.pods[index].probes[kind], index)
        return subprocess.run(command, env=self._env(index), capture_output=True, timeout=10).returncode == 0


@pytest.fixture(scope="module")
def model(checkpoint: Saver) -> Path:
    return checkpoint("llama-gqa", "hf")


def job_in(folder: Path, model: Path) -> Job:
    folder.mkdir(exist_ok=True)
    (folder / "model").symlink_to(model)
    return Job(folder / "model", folder)


@pytest.fixture(scope="module")
def plain(model: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """What two ranks give, undisturbed; the model has the name it has on the pods' volume."""
    return job_in(tmp_path_factory.mktemp("plain"), model).plain(2)


@pytest.fixture
def nodes() -> Iterator[netns.Nodes]:
    netns.require()
    with netns.Nodes(2, prefix="llama-batch", domains=("llama-batch", "llama-batch.default")) as found:
        yield found


@pytest.mark.spmd
@pytest.mark.slow
@pytest.mark.parametrize("name", MANIFESTS)
def test_pods_are_preempted_and_finish(
    name: str, nodes: netns.Nodes, tmp_path: Path, model: Path, plain: list[str]
) -> None:
    """SIGTERM to pod 1 as its node is drained; all leave with 75, are made anew, and finish. Probes on the way."""
    job = job_in(tmp_path, model)
    pods = Pods(name, nodes, job, GPUS="1")
    old = job.folder / "out.jsonl.status.json"
    old.write_text("{}")
    assert not pods.probe("startupProbe", 0)
    old.write_text('{"state": "running", "prompt_tokens": 0}')
    assert not pods.probe("startupProbe", 0), "a model that is loading counts as loaded"
    old.write_text('{"state": "running", "prompt_tokens": 7}')
    assert pods.probe("startupProbe", 0) and pods.probe("readinessProbe", 0)
    # from here on it is that of an attempt which was killed long ago
    os.utime(old, (1, 1))
    started = pods.start(step_seconds=0.02)
    for i in (0, 1):
        assert not pods.probe("startupProbe", i), "the status of an earlier attempt counts as loaded"
        assert not pods.probe("livenessProbe", i), "a job that hangs counts as alive"
    job.wait_for_results(lambda: all(p.poll() is None for p in started))
    assert pods.probe("livenessProbe", 0) and pods.probe("livenessProbe", 1)
    first = Path(pods.pods[1].command[0]).name
    nodes.signal(1, first if name != "job.yaml" else "llama_dist", signal.SIGTERM)
    assert [p.wait(60) for p in started] == [75, 75], pods.logs()
    assert job.status()["state"] == "preempted"
    assert re.search(r'"state": "preempted".*"prompt_tokens": [1-9]', old.read_text())  # the words the probes look for
    started = pods.start()
    if name != "leaderworkerset.yaml":
        assert [p.wait(90) for p in started] == [0, 0], pods.logs()
        job.check_whole(plain)
        return
    wait_for_end(job, started)
    job.check_whole(plain)
    assert pods.probe("startupProbe", 0)
    os.utime(old, (1, 1))
    assert pods.probe("livenessProbe", 0), "a finished group is alive, however long ago it finished"
    for i in (0, 1):
        nodes.signal(i, "sh", signal.SIGTERM)
    assert all(p.wait(10) in (0, 143) for p in started)  # 0: it was leaving just then


def wait_for(what: Callable[[], bool], within: float) -> None:
    until = time.monotonic() + within
    while not what():
        assert time.monotonic() < until, f"not within {within} s"
        time.sleep(0.05)


def wait_for_end(job: Job, started: list[subprocess.Popen[str]]) -> None:
    """A group waits to be deleted when its job is done."""

    def ended() -> bool:
        assert all(p.poll() is None for p in started), "a pod ended"
        return bool(job.status()["state"] == "completed")

    wait_for(ended, 90)
