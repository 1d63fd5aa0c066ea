"""`doctor` on real ranks: what is well, and everything that it is to name."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from llama_dist.parallel.probe import SIZES
from llama_dist.parallel.reach import await_port
from tests.conftest import Saver
from tests.doctor_ranks import Plant, Ran, run_doctor
from tests.spmd import free_port, rank_env

ROOT = Path(__file__).resolve().parent.parent
CPU = ["--device=cpu", "--json", "--timeout=10"]
HASTY = ["--device=cpu", "--json", "--timeout=6"]
pytestmark = pytest.mark.spmd


def text_of(ran: Ran, kind: str) -> str:
    (text,) = [finding["text"] for finding in ran.report["findings"] if finding["finding"] == kind]
    return str(text)


def test_all_is_well(checkpoint: Saver, tmp_path: Path) -> None:
    """Four ranks, two copies of the model; every pair, every size of all-reduce, one folder, nothing left behind."""
    model = checkpoint("llama-gqa", "hf")
    (tmp_path / "out").mkdir()
    words = [*CPU, f"--ckpt_dir={model}", f"--output_file={tmp_path}/out/o.jsonl", "--model_parallel_size=2"]
    ran = run_doctor(4, words, tmp_path)
    assert ran.codes == dict.fromkeys(range(4), 0), ran.out[0] + ran.log
    found = ran.report
    assert found["ok"] and not [f for f in found["findings"] if f["wrong"]]
    assert sorted((p["a"], p["b"]) for p in found["pairs"]) == [(a, b) for a in range(4) for b in range(a + 1, 4)]
    assert all(p["latency"] > 0 and p["bandwidth"] > 0 for p in found["pairs"])
    for ranks in ([0, 1], [2, 3]):
        assert [row["bytes"] for row in found["all_reduce"] if row["ranks"] == ranks] == list(SIZES)
    assert [row["rank"] for row in found["ranks"]] == [row["rank"] for row in found["speeds"]] == [0, 1, 2, 3]
    assert "one folder" in found["checkpoint"]
    (reading,) = found["readings"]
    assert reading["rank"] == 0 and reading["bytes"] > 0
    assert all(sight["sees"] for sight in found["output"])
    assert os.listdir(tmp_path / "out") == []
    assert ran.log == "" and not any(ran.out[rank] for rank in (1, 2, 3))


@pytest.mark.parametrize("words", [[], ["--json"]])
def test_alone_and_without_a_checkpoint(words: list[str]) -> None:
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "llama_dist", "doctor", "--device=cpu", *words]
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=ROOT, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["ok"] if words else done.stdout.endswith("\nall is well\n")


def test_a_rank_that_never_comes(tmp_path: Path) -> None:
    """The others are compared and timed all the same."""
    ran = run_doctor(3, HASTY, tmp_path, start=[0, 2])
    assert ran.codes == {0: 1, 2: 1}
    assert ran.wrong() == {"missing": [1]}
    assert text_of(ran, "missing").startswith("rank 1 of 3 never came in 6 s; heard of ranks 0, 2 (host ")
    assert [(p["a"], p["b"]) for p in ran.report["pairs"]] == [(0, 2)]


def test_rank_0_never_comes(tmp_path: Path) -> None:
    """It would have kept the store. One of the others says so."""
    ran = run_doctor(3, HASTY, tmp_path, start=[1, 2])
    assert ran.codes == {1: 1, 2: 1} and ran.out[2] == ""
    (finding,) = json.loads(ran.out[1])["findings"]
    assert "no way to rank 0 at 127.0.0.1:" in finding["text"] and "Connection refused" in finding["text"]


def test_a_rank_that_comes_late(tmp_path: Path) -> None:
    ran = run_doctor(2, HASTY, tmp_path, Plant("late", 1))
    assert ran.codes == {0: 1, 1: 1}
    assert ran.wrong() == {"late": [1]}, ran.report


@pytest.mark.slow
@pytest.mark.parametrize("step", ["connect", "compute", "mesh"])
def test_a_rank_that_is_stopped(tmp_path: Path, step: str) -> None:
    what = Plant("stop in mesh", 1) if step == "mesh" else Plant("stop", 1, step)
    ran = run_doctor(3, HASTY, tmp_path, what)
    assert ran.codes == {0: 1, 1: None, 2: 1}
    assert ran.wrong() == {"silent": [1]}, ran.report["findings"]
    assert f"pid {ran.report['ranks'][1]['pid']}) is stopped" in text_of(ran, "silent")
    assert ran.seconds < 55


def test_rank_0_dies(tmp_path: Path) -> None:
    """And the store with it. One of the others says so, at once."""
    ran = run_doctor(3, HASTY, tmp_path, Plant("kill", 0, "compute"))
    assert ran.codes == {0: -signal.SIGKILL, 1: 1, 2: 1}
    (told,) = [json.loads(ran.out[rank]) for rank in (1, 2) if ran.out.get(rank)]
    (finding,) = told["findings"]
    assert finding["ranks"] == [0] and "died while computing" in finding["text"]


def test_rank_0_has_a_bound_of_its_own(tmp_path: Path) -> None:
    """Whatever hangs there, the report comes as far as it is known."""
    ran = run_doctor(2, HASTY, tmp_path, Plant("hang", 0))
    assert ran.codes == {0: 1, 1: 1}
    (finding,) = [finding for finding in ran.report["findings"] if finding["wrong"]]
    assert "did not come to its end: no end after 9 s" in finding["text"]
    assert len(ran.report["ranks"]) == 2 and len(ran.report["clocks"]) == 1


@pytest.mark.slow
@pytest.mark.parametrize(("way", "after"), [("stop", ()), ("stop", (2,)), ("stop", (1, 2)), ("kill", (1, 2))], ids=str)
def test_rank_0_goes_before_the_ranks_have_met(tmp_path: Path, way: str, after: tuple[int, ...]) -> None:
    """And the store with it. One of the others says so, whichever of them have come that far."""
    ran = run_doctor(3, HASTY, tmp_path, Plant(way, 0, "here", after))
    assert ran.codes == {0: None if way == "stop" else -signal.SIGKILL, 1: 1, 2: 1}
    assert ran.out[2] == ""
    (finding,) = json.loads(ran.out[1])["findings"]
    assert "no way to rank 0 at 127.0.0.1:" in finding["text"]
    if way == "stop":
        assert "it takes connections, but is stopped or is another program" in finding["text"]


@pytest.mark.slow
def test_rank_0_is_stopped(tmp_path: Path) -> None:
    """And the store with it. One of the others says so."""
    ran = run_doctor(3, HASTY, tmp_path, Plant("stop", 0, "compute"))
    assert ran.codes == {0: None, 1: 1, 2: 1}
    (told,) = [json.loads(ran.out[rank]) for rank in (1, 2) if ran.out.get(rank)]
    (finding,) = told["findings"]
    assert finding["ranks"] == [0] and "is stopped" in finding["text"]


@pytest.mark.slow
def test_a_rank_that_dies(tmp_path: Path) -> None:
    ran = run_doctor(3, HASTY, tmp_path, Plant("kill", 1, "compute"))
    assert ran.codes == {0: 1, 1: -signal.SIGKILL, 2: 1}
    assert ran.wrong() == {"silent": [1]}
    assert "died while computing" in text_of(ran, "silent")


@pytest.mark.parametrize(
    ("what", "kind", "says"),
    [
        (Plant("slow", 1), "slow", "is slow: a fixed product takes"),
        (Plant("clock", 1, 5.0), "clock", "the clock of host elsewhere is 5.00 s ahead of that of host"),
        (Plant("clock", 1, -90.0), "clock", "the clock of host elsewhere is 90.0 s behind that of host"),
        (Plant("version", 1, "2.9.1"), "differs", "has torch 2.9.1, the others 2."),
        (Plant("deaf", 1), "unconnected", "rank 0 cannot connect to rank 1 at 127.0.0.1: Connection refused"),
    ],
    ids=lambda value: f"{value.kind}{value.at or ''}" if isinstance(value, Plant) else "",
)
def test_a_rank_that_differs(tmp_path: Path, what: Plant, kind: str, says: str) -> None:
    ran = run_doctor(2, CPU, tmp_path, what)
    assert ran.codes == {0: 1, 1: 1}
    assert list(ran.wrong()) == [kind], ran.report["findings"]
    assert says in text_of(ran, kind)
    assert bool(ran.report["pairs"]) == (kind != "unconnected")


def test_checkpoints_and_folders_that_are_not_one(checkpoint: Saver, tmp_path: Path) -> None:
    """Ranks 0 and 1 share a folder, 2 has a copy, 3 another model, and 4 none; each has its own folder of results."""
    model = checkpoint("llama-gqa", "hf")
    shutil.copytree(model, tmp_path / "copy")
    shutil.copytree(model, tmp_path / "other")
    weights = next((tmp_path / "other").glob("*.safetensors"))
    raw = bytearray(weights.read_bytes())
    raw[-100] ^= 1
    weights.write_bytes(raw)
    folders = [str(model), str(model), f"{tmp_path}/copy", f"{tmp_path}/other", f"{tmp_path}/none"]
    for rank in (0, 1):
        (tmp_path / f"out-of-{rank}").mkdir()
    words = [
        [*CPU, f"--ckpt_dir={folder}", f"--output_file={tmp_path}/out-of-{rank}/o.jsonl"]
        for rank, folder in enumerate(folders)
    ]
    ran = run_doctor(5, words, tmp_path)
    assert ran.wrong() == {"checkpoint": [3], "failed": [4]}, ran.report["findings"]
    assert f"{weights.name} has other content there" in text_of(ran, "checkpoint")
    assert "looking at the checkpoint: no checkpoint at" in text_of(ran, "failed")
    notes = {tuple(f["ranks"]): f["text"] for f in ran.report["findings"] if f["finding"] == "output"}
    assert list(notes) == [(1, 2, 3, 4)] and "rank 0 alone writes there" in notes[(1, 2, 3, 4)]

    ran = run_doctor(3, words[:3], tmp_path / "again")
    assert ran.codes[0] == 0 and "2 copies alike: ranks 0-1 (host " in ran.report["checkpoint"]


def test_replicas_need_one_folder_of_results(tmp_path: Path) -> None:
    words = []
    for rank in (0, 1):
        (tmp_path / str(rank)).mkdir()
        words.append([*CPU, "--model_parallel_size=1", f"--output_file={tmp_path}/{rank}/o.jsonl"])
    ran = run_doctor(2, words, tmp_path)
    assert ran.wrong() == {"output": [1]}
    assert "every replica writes there" in text_of(ran, "output")


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    ran = run_doctor(2, [*CPU, f"--output_file={tmp_path}/file/o.jsonl"], tmp_path)
    assert ran.wrong() == {"failed": [0]}
    assert "cannot write into the folder of --output_file" in text_of(ran, "failed")


# ---- under torchrun


def torchrun(folder: Path, module: str, *words: str, **env: str) -> tuple[subprocess.Popen[str], Path]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    with (folder / "stderr").open("w") as err:
        started = subprocess.Popen(
            [*command, "-m", module, "doctor", "--device=cpu", *words],
            stdout=subprocess.PIPE,
            stderr=err,
            text=True,
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **env},
        )
    return started, folder / "stderr"


@pytest.mark.slow
def test_the_tables_under_torchrun(checkpoint: Saver, tmp_path: Path) -> None:
    started, err = torchrun(tmp_path, "tests.doctor_ranks", f"--ckpt_dir={checkpoint('llama-gqa', 'hf')}")
    out, _ = started.communicate(timeout=120)
    assert started.returncode == 0, out + err.read_text()
    assert out.startswith("2 of 2 ranks came, on 1 host (launcher: torchrun); 2 hold a copy of the model\n")
    for head in ("\nrank  host", "\npairs over gloo", "\nall-reduce of 2 ranks over gloo", "\n64 MB ", "\ncheckpoint "):
        assert head in out
    assert out.endswith("\nall is well\n")


@pytest.mark.slow
def test_a_rank_dies_under_torchrun(tmp_path: Path) -> None:
    """torchrun then stops all others at once; rank 0 still says what it knows."""
    plant = json.dumps(["kill", 1, "compute"])
    started, err = torchrun(tmp_path, "tests.doctor_ranks", "--json", DOCTOR_PLANT=plant)
    out, _ = started.communicate(timeout=120)
    assert started.returncode == 1, out + err.read_text()
    found: dict[str, Any] = json.loads(out)
    kinds = {f["finding"]: f["ranks"] for f in found["findings"] if f["wrong"]}
    assert kinds == {"silent": [1], "interrupted": []}, found["findings"]
    assert "stopped by SIGTERM" in err.read_text()


def test_told_to_stop_while_it_waits(tmp_path: Path) -> None:
    """For a rank that does not come: the report comes all the same, and the exit code of the signal."""
    port = free_port()
    env = {**os.environ, "PYTHONPATH": str(ROOT), **rank_env(0, 2, port)}
    command = [sys.executable, "-m", "llama_dist", "doctor", "--device=cpu", "--json", "--timeout=60"]
    started = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env, cwd=ROOT)
    await_port(("127.0.0.1", port), 60.0)
    store = TCPStore("127.0.0.1", port, is_master=False, timeout=timedelta(seconds=60), wait_for_workers=False)
    store.wait(["llama_dist/0/roll/here/0"])  # what it tells last before it waits
    del store
    started.send_signal(signal.SIGTERM)
    out, err = started.communicate(timeout=20)
    assert started.returncode == 128 + signal.SIGTERM
    (finding,) = json.loads(out)["findings"]
    assert finding["finding"] == "interrupted" and "stopped by SIGTERM" in finding["text"]
    assert err == "llama_dist: error: stopped by SIGTERM\n"
