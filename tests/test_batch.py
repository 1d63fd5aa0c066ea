"""`batch` from end to end on tiny checkpoints: worlds and replicas, kills and resumes, drains, what is refused."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from llama_dist.__main__ import main
from llama_dist.text.load import load_tokenizer
from tests.batch_jobs import (
    TINY,
    Done,
    batch,
    drained,
    from_endless_pipe,
    from_stdin,
    killed,
    opened_late,
    records_of,
    slow_to_load,
    stopped_while_loading,
    under_srun,
    without_weights,
)
from tests.cluster_jobs import paced
from tests.conftest import Saver
from tests.spmd import RankFailed, run_ranks

pytestmark = pytest.mark.spmd
CASE = "llama-gqa"
ROOT = Path(__file__).parent.parent


def requests(n: int) -> list[dict[str, Any]]:
    """Requests of all kinds; the same every time."""
    dice = random.Random(5)
    found: list[dict[str, Any]] = []
    for i in range(n):
        entry: dict[str, Any] = {"custom_id": f"r{i}", "max_tokens": dice.randrange(0, 14)}
        if i % 4 == 3:
            entry["messages"] = [{"role": "user", "content": "the " * dice.randrange(1, 6)}]
        elif i % 4 == 2:
            entry["prompt"] = [dice.randrange(5, 290) for _ in range(dice.randrange(1, 30))]
        else:
            entry["prompt"] = "and the others " * dice.randrange(1, 4)
        entry |= [
            {"temperature": 0},
            {"seed": i, "n": 3, "top_k": 20},
            {"stop": ["e", "an"], "presence_penalty": 1.5},
            {"repetition_penalty": 1.3, "logit_bias": {"100": 5}, "top_p": 0.9},
            {"temperature": 0, "echo": True} if i % 4 < 3 else {"min_p": 0.05},
        ][i % 5]
        found.append(entry)
    found[4] = {"custom_id": "r1", "prompt": "a second r1"}
    found[9] = {"custom_id": "r9", "prompt": [7] * 97}
    return found


@pytest.fixture(scope="module")
def folder(checkpoint: Saver) -> str:
    return str(checkpoint(CASE, "hf"))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("batch") / "in.jsonl"
    path.write_text("".join(json.dumps(entry) + "\n" for entry in requests(60)))
    return path


@pytest.fixture(scope="module")
def whole(folder: str, source: Path) -> list[bytes]:
    """An uninterrupted run's records on one rank."""
    output = source.with_name("whole.jsonl")
    (done,) = run_ranks(1, batch, folder, str(source), str(output), [])
    assert done.code == 0 and "60" in output.with_name("whole.jsonl.status.json").read_text()
    return records_of(output)


def status(output: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(output.with_name(output.name + ".status.json").read_text())
    return found


def test_all_lines_are_answered(whole: list[bytes]) -> None:
    by_id = [json.loads(line) for line in whole]
    assert sorted(int(r["id"].rpartition("_")[2]) for r in by_id) == list(range(1, 61))
    codes = sorted(r["error"]["code"] for r in by_id if r["error"])
    assert codes == ["context_length_exceeded", "duplicate_custom_id"]
    three = next(r for r in by_id if r["custom_id"] == "r6")["response"]["body"]
    assert [c["index"] for c in three["choices"]] == [0, 1, 2]
    assert len({c["text"] for c in three["choices"]}) > 1, "answers of one line are sampled alike"
    usage = three["usage"]
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    ends = {c["finish_reason"] for r in by_id if r["response"] for c in r["response"]["body"]["choices"]}
    assert ends == {"stop", "length"}


@pytest.mark.parametrize(
    ("world", "flags"),
    [
        (1, ["--max_batch_size=1"]),
        (1, ["--max_batch_size=64", "--max_batch_tokens=64", "--noprefix_caching"]),
        (2, []),
        (2, ["--model_parallel_size=1"]),
        (4, ["--model_parallel_size=2", "--ordered"]),
    ],
)
def test_any_world_replicas_and_batch_give_the_same_file(
    folder: str, source: Path, whole: list[bytes], tmp_path: Path, world: int, flags: list[str]
) -> None:
    output = tmp_path / "out.jsonl"
    done = run_ranks(world, batch, folder, str(source), str(output), flags)
    assert {d.code for d in done} == {0}
    assert records_of(output) == whole
    assert (status(output)["state"], status(output)["done"], status(output)["failed"]) == ("completed", 60, 2)
    assert not list(tmp_path.glob("*.part-*")) and not list(tmp_path.glob("*.lock")), list(tmp_path.iterdir())
    if "--ordered" in flags:
        lines = [json.loads(line)["id"] for line in output.read_text().splitlines()]
        assert lines == sorted(lines, key=lambda i: int(i.rpartition("_")[2]))


@pytest.mark.parametrize(
    ("world", "flags", "rank", "turns", "resumed"),
    [
        (1, [], 0, (2, 5, 1), (2, [])),
        (2, [], 0, (2, 5, 1), (1, [])),
        (2, ["--model_parallel_size=1"], 1, (1,), (1, [])),
        (2, ["--model_parallel_size=1"], 0, (2, 2), (2, ["--model_parallel_size=1"])),
    ],
)
def test_killed_and_resumed(
    folder: str,
    source: Path,
    whole: list[bytes],
    tmp_path: Path,
    world: int,
    flags: list[str],
    rank: int,
    turns: tuple[int, ...],
    resumed: tuple[int, list[str]],
) -> None:
    output = tmp_path / "out.jsonl"
    for at, turn in enumerate(turns):
        torn = at % 2 == 0
        with pytest.raises(RankFailed) as caught:
            run_ranks(world, killed, folder, str(source), str(output), ["--max_batch_size=4", *flags], turn, rank, torn)
        assert "exit code -9" in caught.value.errors[rank]
    parts = [*tmp_path.glob("out.jsonl"), *tmp_path.glob("*.part-*")]
    assert 0 < sum(path.read_bytes().count(b"\n") for path in parts) < 60
    done = run_ranks(resumed[0], batch, folder, str(source), str(output), resumed[1])
    assert {d.code for d in done} == {0}
    assert records_of(output) == whole
    assert status(output)["done"] == 60


def test_told_to_stop_it_ends_with_75_and_goes_on_later(
    folder: str, source: Path, whole: list[bytes], tmp_path: Path
) -> None:
    output = tmp_path / "out.jsonl"
    done = run_ranks(2, drained, folder, str(source), str(output), ["--max_batch_size=4"], 3)
    assert {d.code for d in done} == {75} and status(output)["state"] == "preempted"
    assert 0 < status(output)["done"] == len(records_of(output)) < 60
    done = run_ranks(1, batch, folder, str(source), str(output), ["--deadline=0"])
    assert done[0].code == 75
    done = run_ranks(1, batch, folder, str(source), str(output), [])
    assert done[0].code == 0 and status(output)["state"] == "completed"
    assert records_of(output) == whole


def test_a_finished_job_ends_before_weights_are_read(
    folder: str, source: Path, whole: list[bytes], tmp_path: Path
) -> None:
    output = tmp_path / "out.jsonl"
    run_ranks(1, batch, folder, str(source), str(output), [])
    done = run_ranks(2, without_weights, folder, str(source), str(output), ["--ordered"])
    assert {d.code for d in done} == {0} and records_of(output) == whole
    assert output.read_bytes().splitlines()[0].startswith(b'{"id":"batch_req_')
    with pytest.raises(RankFailed, match="weights were read"):
        run_ranks(1, without_weights, folder, str(source), str(output), ["--retry_failed"])


def test_large_files_are_read_while_the_ranks_keep_in_touch(
    folder: str, source: Path, whole: list[bytes], tmp_path: Path
) -> None:
    output = tmp_path / "out.jsonl"
    done = run_ranks(2, opened_late, folder, str(source), str(output), ["--model_parallel_size=1"])
    assert {d.code for d in done} == {0} and records_of(output) == whole
    with pytest.raises(RankFailed) as caught:
        run_ranks(2, opened_late, folder, str(source), str(output), ["--seed=9"])
    assert "ConfigError" in caught.value.errors[0] and "--seed (9, was 1)" in caught.value.errors[0]


def test_stdin_to_stdout(folder: str, source: Path, whole: list[bytes]) -> None:
    done: list[Done] = run_ranks(2, from_stdin, folder, str(source), [])
    assert {d.code for d in done} == {0} and done[1].out == ""
    # what a batch was computed beside plays no part, nor does where it came from
    assert sorted(line.encode() + b"\n" for line in done[0].out.splitlines()) == whole


def test_told_to_stop_while_a_pipe_is_read(folder: str, tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    (done,) = run_ranks(1, from_endless_pipe, folder, str(output))
    assert done.code == 75 and status(output)["state"] == "preempted" and status(output)["total"] is None


def test_told_to_stop_while_it_loads(folder: str, source: Path, whole: list[bytes], tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    ranks = run_ranks(2, stopped_while_loading, folder, str(source), str(output), [])
    assert [done.code for done, _ in ranks] == [75, 75] and status(output)["state"] == "preempted"
    assert ranks[1][1] == 1, "the rank that was told went on reading"
    assert output.read_bytes() == b"" if output.exists() else True
    run_ranks(1, batch, folder, str(source), str(output), [])
    assert records_of(output) == whole


def test_a_rank_slow_to_load_is_waited_for(folder: str, source: Path, whole: list[bytes], tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    done = run_ranks(2, slow_to_load, folder, str(source), str(output), ["--timeout=8"], 10.0)
    assert {d.code for d in done} == {0} and records_of(output) == whole


def test_under_srun_the_others_hear_of_what_only_rank_0_refuses(folder: str, source: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    began = time.monotonic()
    with pytest.raises(RankFailed) as caught:
        run_ranks(2, under_srun, folder, str(source), str(output), ["--strict"])
    assert "ConfigError" in caught.value.errors[0] and "bad lines" in caught.value.errors[0]
    assert 1 in caught.value.errors and time.monotonic() - began < 30, "rank 1 waited for its timeout"


def test_prefix_cache_hits_are_in_the_usage_where_they_are_asked_for(folder: str, tmp_path: Path) -> None:
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    entries = [{"custom_id": f"c{i}", "prompt": [7] * 40 + [i], "max_tokens": 2} for i in (10, 11)]
    source.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    run_ranks(1, batch, folder, str(source), str(output), ["--cached_tokens", "--max_batch_size=1"])
    usages = [json.loads(line)["response"]["body"]["usage"] for line in records_of(output)]
    assert [u["prompt_tokens_details"] for u in usages] == [{"cached_tokens": 0}, {"cached_tokens": 32}]
    with pytest.raises(RankFailed, match=r"--cached_tokens \(False, was True\)"):
        run_ranks(1, batch, folder, str(source), str(output), [])
    run_ranks(1, batch, folder, str(source), str(tmp_path / "plain.jsonl"), [])
    assert b"prompt_tokens_details" not in (tmp_path / "plain.jsonl").read_bytes()


def test_a_template_prints_the_day_the_job_began(folder: str, tmp_path: Path) -> None:
    dated, source, output = tmp_path / "dated", tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    shutil.copytree(folder, dated)
    config = json.loads((dated / "tokenizer_config.json").read_text())
    config["chat_template"] = "{{ strftime_now('%Y') }}{{ messages[0].content }}"
    (dated / "tokenizer_config.json").write_text(json.dumps(config))
    asked = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 1, "return_token_ids": True}
    source.write_text(json.dumps(asked) + "\n")
    run_ranks(1, batch, str(dated), str(source), str(output), ["--deadline=0"])
    about = output.with_name("out.jsonl.job.json")
    year = json.loads(about.read_text())["began"][:4]
    about.write_text(about.read_text().replace(f'"began": "{year}', '"began": "2001'))
    output.write_bytes(b'{"id":"torn')  # something stands, so that the job is not begun anew
    run_ranks(1, batch, str(dated), str(source), str(output), [])
    (record,) = map(json.loads, records_of(output))
    ids = record["response"]["body"]["choices"][0]["prompt_token_ids"]
    assert load_tokenizer(dated).decode(ids) == "2001x"


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--input_file=none.jsonl"], "none.jsonl cannot be read"),
        (["--output_file=no/where"], "there is no folder"),
        (["--strict"], "bad lines: line 5: its custom_id is on line 2 too; line 10: the prompt has 97 tokens"),
        (["--grace=-1"], "--grace is -1.0"),
        (["--output_file=-", "--ordered"], "--ordered"),
        (["--report=no/where.html"], "no/where"),
    ],
)
def test_refusals_are_one_line_and_code_2(
    folder: str,
    source: Path,
    tmp_path: Path,
    flags: list[str],
    words: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    given = {"--input_file": str(source), "--output_file": "out.jsonl"}
    for flag in flags:
        name, _, value = flag.partition("=")
        given[name] = value
    argv = ["batch", f"--ckpt_dir={folder}", *TINY[:-1], *(f"{k}={v}" if v else k for k, v in given.items())]
    assert main(argv) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and err.startswith("llama_dist: error: ") and words in err, err
    assert not (tmp_path / "out.jsonl").exists() and not list(tmp_path.glob("*.lock"))


@pytest.mark.slow
def test_sigterm_under_torchrun(folder: str, whole: list[bytes], source: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "llama_dist"]
    command += ["batch", f"--ckpt_dir={folder}", f"--input_file={source}", f"--output_file={output}", *TINY]
    env = {**os.environ, **paced(0.05)}
    job = subprocess.Popen([*command, "--max_batch_size=1"], stderr=subprocess.PIPE, text=True, env=env)
    try:
        until = time.monotonic() + 60
        while not (output.exists() and output.stat().st_size):
            assert time.monotonic() < until and job.poll() is None
            time.sleep(0.02)
        job.send_signal(signal.SIGTERM)
        _, err = job.communicate(timeout=60)
    finally:
        job.kill()
    assert status(output)["state"] == "preempted", err
    assert 0 < status(output)["done"] == len(records_of(output)) < 60
    done = run_ranks(1, batch, folder, str(source), str(output), [])
    assert done[0].code == 0 and records_of(output) == whole
