"""The files of a batch job: exactly once after any end, one job at a time, and the same one. No model."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from llama_dist.errors import ConfigError, LlamaDistError
from llama_dist.frontend.batch import outfile
from llama_dist.frontend.batch.drain import Drain
from llama_dist.frontend.batch.identity import fingerprint_path
from llama_dist.frontend.batch.lock import Lock
from llama_dist.frontend.batch.others import Others
from llama_dist.frontend.batch.outfile import Appender, part_path
from llama_dist.frontend.batch.records import in_order, records
from llama_dist.frontend.batch.survey import DONE, FAILED, REPEATED, TODO
from llama_dist.frontend.tally import Finished
from tests.batch_play import Engine, Kill, Killed, desk_for, finish, opened, options, write_input

N = 40


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_input(tmp_path / "in.jsonl", N)


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "out.jsonl"


@pytest.fixture
def whole(source: Path, tmp_path: Path) -> list[bytes]:
    """The lines of an uninterrupted run's output, sorted."""
    path = tmp_path / "whole.jsonl"
    assert finish(source, path)
    return sorted(path.read_bytes().splitlines(keepends=True))


def held(path: Path) -> list[bytes]:
    return sorted(path.read_bytes().splitlines(keepends=True))


def release(job: Any) -> None:
    job.lock.release()


# ---- one run


def test_every_line_gets_its_record(source: Path, whole: list[bytes]) -> None:
    found = [json.loads(line) for line in whole]
    by_line = {int(r["id"].rpartition("_")[2]): r for r in found}
    assert sorted(by_line) == [n for n in range(1, N + 1) if n != 6]
    codes = {n: r["error"]["code"] for n, r in by_line.items() if r["error"]}
    assert codes == {3: "invalid_json_line", 8: "duplicate_custom_id", 9: "server_error"}
    assert all(f"line {n}: " in by_line[n]["error"]["message"] for n in codes)
    assert "line 1 already" in by_line[8]["error"]["message"]
    body = by_line[12]["response"]["body"]
    assert [c["text"] for c in body["choices"]] == ["21 tp"] * 2 and body["created"] == 12


def test_what_counts_is_on_disk(source: Path, output: Path) -> None:
    job, told = opened(source, output), list[Finished]()
    sink = Appender(output)
    desk = desk_for(job, sink, told=told, ahead=8)
    engine = Engine()
    for _ in range(200):
        engine.run(desk, ticks=1)
        assert len(told) <= len(held(output)) == desk.written
    assert len(told) == N - 1 and sum(not f.ok for f in told) == 3 and desk.complete
    assert engine.most <= 9, "more than `ahead` requests, and the rest of a line, were in flight"
    release(job)


@pytest.mark.parametrize("cancel", [False, True])
def test_draining_stops_taking_lines_on(source: Path, output: Path, whole: list[bytes], cancel: bool) -> None:
    now, event = [0.0], threading.Event()
    drain = Drain(event, None, grace=0.0 if cancel else 5.0, clock=lambda: now[0])
    job, sink = opened(source, output), Appender(output)
    desk, engine = desk_for(job, sink, drain=drain), Engine()
    engine.run(desk, ticks=3)
    event.set()
    answered = engine.answered
    engine.run(desk)
    assert not desk.complete and engine.stopping
    assert engine.answered == answered if cancel else engine.answered > answered
    assert 0 < len(held(output)) < N - 1 and set(held(output)) < set(whole)
    release(job)
    assert finish(source, output) and held(output) == whole


def test_a_full_disk_leaves_whole_records(
    source: Path, output: Path, whole: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    job, sink = opened(source, output), Appender(output)
    real, room = outfile.os.write, [3000]

    def write(fd: int, data: memoryview) -> int:
        if not room[0]:
            raise OSError(28, "No space left on device")
        n = real(fd, data[: room[0]])
        room[0] -= n
        return n

    with monkeypatch.context() as patch:
        patch.setattr(outfile, "os", SimpleNamespace(**{**vars(outfile.os), "write": write}))
        with pytest.raises(LlamaDistError, match="No space left on device"):
            Engine().run(desk_for(job, sink))
    assert set(held(output)) < set(whole)
    release(job)
    assert finish(source, output) and held(output) == whole


# ---- after an end


def test_truncated_at_every_byte_of_its_last_two_records(output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = write_input(output.with_name("in.jsonl"), 12)
    monkeypatch.setattr(os, "fsync", lambda fd: None)  # 600 runs; whether they sync is not the question here
    finish(source, output)
    whole, data = held(output), output.read_bytes()
    lines = data.splitlines(keepends=True)
    assert len(lines) == 11
    for size in range(len(data) - len(lines[-1]) - len(lines[-2]), len(data) + 1):
        output.write_bytes(data[:size])
        assert finish(source, output), size
        assert held(output) == whole, size


def test_a_torn_end_of_another_kind(source: Path, output: Path, whole: list[bytes]) -> None:
    finish(source, output)
    data = output.read_bytes()
    lines = data.splitlines(keepends=True)
    holes = lines[-1][:40] + b"\0" * 20 + lines[-1][60:]
    for damaged in (
        data + b"\0" * 4096,  # a block that was given to the file but not written
        b"".join(lines[:-1]) + holes,
        b"".join(lines[:4]) + b'{"id":"batch_re\n' + b"".join(lines[4:]),
        b"".join(lines[:9]) + holes + b"".join(lines[9:]),
        data + lines[7] + lines[9],
    ):
        output.write_bytes(damaged)
        assert finish(source, output)
        assert held(output) == whole


def test_a_finished_job_is_not_touched(source: Path, output: Path) -> None:
    finish(source, output)
    before = (output.stat().st_mtime_ns, output.stat().st_ino, output.read_bytes())
    job = opened(source, output)
    assert job.finished and (job.total, job.done, job.failed) == (N - 1, N - 1, 3)
    release(job)
    assert before == (output.stat().st_mtime_ns, output.stat().st_ino, output.read_bytes())


def test_retry_failed_runs_error_lines_again(source: Path, output: Path, whole: list[bytes]) -> None:
    finish(source, output)
    kept = [line for line in output.read_bytes().splitlines(keepends=True) if b'"error":null' in line]
    job = opened(source, output, retry_failed=True)
    assert output.read_bytes().splitlines(keepends=True) == kept
    assert [job.survey.marks[n] for n in (1, 3, 8, 9)] == [DONE, TODO, REPEATED, TODO]
    assert (job.total - job.done, job.failed) == (3, 0)
    release(job)
    assert finish(source, output) and held(output) == whole


def test_ordered(source: Path, output: Path, whole: list[bytes]) -> None:
    finish(source, output)
    assert not in_order(output), "the engine answers out of order"
    assert finish(source, output, ordered=True)
    assert in_order(output) and held(output) == whole
    assert [r.line for r in records(output)] == [n for n in range(1, N + 1) if n != 6]
    node = output.stat().st_ino
    assert finish(source, output, ordered=True) and output.stat().st_ino == node, "rewritten though in order"


@pytest.mark.parametrize("replicas", [1, 2, 3])
def test_killed_at_every_change_of_the_disk(
    source: Path, output: Path, whole: list[bytes], replicas: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Run, merge, order and retry, each call killed once; then run again, by another number of replicas."""
    dice = random.Random(replicas)
    for flags in ({"ordered": True}, {"retry_failed": True}):
        for at in range(1, 200):
            for path in output.parent.glob("out.jsonl*"):
                path.unlink()
            if "retry_failed" in flags:
                finish(source, output)
            with monkeypatch.context() as patch:
                kill = Kill(patch, at)
                with contextlib.suppress(Killed):
                    finish(source, output, replicas=replicas, **flags)
            if not kill.dead:
                break
            survivors = output.read_bytes().splitlines(keepends=True) if output.exists() else []
            assert set(survivors[:-1]) <= set(whole), "more than the last line is torn"
            assert finish(source, output, replicas=dice.choice([1, 2]), ordered="ordered" in flags), at
            assert held(output) == whole, at
            assert not outfile.parts_of(output)
            if "ordered" in flags:
                assert in_order(output)
        assert at > 5, f"only {at} calls were killed"


def test_parts_of_a_dead_job_are_merged_once(source: Path, output: Path, whole: list[bytes]) -> None:
    finish(source, output)
    lines = output.read_bytes().splitlines(keepends=True)
    output.write_bytes(b"".join(lines[:10]))
    part_path(output, 0).write_bytes(b"".join(lines[5:20]) + lines[20][:30])
    part_path(output, 12).write_bytes(b"".join(lines[19:25]))
    job = opened(source, output)
    assert job.done == 25 and len(held(output)) == 25 and not outfile.parts_of(output)
    release(job)
    assert finish(source, output) and held(output) == whole


def test_other_replicas_are_counted_by_their_files(output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llama_dist.frontend.batch.others.LOOK_EVERY", 0.0)
    others = Others([part_path(output, 1), part_path(output, 2)])
    assert others.news() == (0, 0)
    part_path(output, 1).write_bytes(b'{"id":"a","error":null}\n{"id":')
    assert others.news() == (1, 0) and others.news() == (0, 0)
    with part_path(output, 1).open("ab") as file:
        file.write(b'"b","response":null,"error":{"code":"x"}}\n')
    assert others.news() == (1, 1)


# ---- one job, and the same one


def test_a_second_job_is_refused_and_told_who_has_it(source: Path, output: Path) -> None:
    first = opened(source, output)
    with pytest.raises(ConfigError, match=r"is being written by pid \d+ on host .*wait") as caught:
        opened(source, output)
    assert "\n" not in str(caught.value)
    release(first)
    again = opened(source, output)
    release(again)
    assert not list(output.parent.glob("*.lock"))


def test_a_lock_dies_with_its_holder(output: Path) -> None:
    read, write = os.pipe()
    holder = os.fork()
    if holder == 0:
        Lock(output)
        os.write(write, b"x")
        time.sleep(60)
        os._exit(1)
    assert os.read(read, 1) == b"x"
    with pytest.raises(ConfigError, match=f"pid {holder} "):
        Lock(output)
    os.kill(holder, signal.SIGKILL)
    os.waitpid(holder, 0)
    Lock(output).release()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"seed": 2}, r"--seed \(2, was 1\)"),
        ({"input": "more"}, r"the input \(41 lines, \d+ bytes, was 40 lines, \d+ bytes\)"),
        ({"input": "other"}, r"the input \(the same size but another content\)"),
        ({"checkpoint": 1}, "the checkpoint"),
        ({"version": 1}, r"version of llama_dist \(.*, was 0.0.0\)"),
    ],
)
def test_another_job_is_refused_naming_what_changed(
    source: Path, output: Path, change: dict[str, Any], words: str
) -> None:
    from llama_dist.frontend.batch.job import open_job
    from tests.batch_play import ENCODER, checked

    finish(source, output)
    before = output.read_bytes()
    text = source.read_text()
    if "input" in change:
        source.write_text(
            text + '{"prompt": "x"}\n' if change["input"] == "more" else text.replace("prompt 39", "prompt 93")
        )
    if "version" in change:
        path = fingerprint_path(output)
        saved = json.loads(path.read_text())
        saved["fingerprint"]["version of llama_dist"] = "0.0.0"
        path.write_text(json.dumps(saved))
    flags = {"seed": change["seed"]} if "seed" in change else {}
    model = checked(dim=5) if "checkpoint" in change else checked()
    with pytest.raises(ConfigError, match=words):
        open_job(options(source, output, **flags), model, ENCODER, source)
    assert output.read_bytes() == before and not list(output.parent.glob("*.lock"))
    job = open_job(options(source, output, force=True, **flags), model, ENCODER, source)
    assert job.done == N - 1
    release(job)
    release(open_job(options(source, output, **flags), model, ENCODER, source))  # it is this job's from now on


@pytest.mark.parametrize("asked", [None, True])
def test_another_processor_is_told_and_refused_where_the_same_bits_were_asked_for(
    source: Path, output: Path, asked: bool | None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from llama_dist.frontend.batch import identity

    monkeypatch.setattr(identity, "mode_of", lambda run, checked: "cpu A")
    finish(source, output, reproducible=asked)
    responses = [json.loads(line)["response"] for line in output.read_text().splitlines()]
    receipts = [response["body"]["system_fingerprint"] for response in responses if response is not None]
    assert len(set(receipts)) == 1 and receipts[0].startswith("fp_")
    monkeypatch.setattr(identity, "mode_of", lambda run, checked: "cpu B")
    if asked:
        with pytest.raises(ConfigError, match=r"numeric mode \(cpu B, was cpu A\)"):
            opened(source, output, reproducible=True)
    else:
        release(opened(source, output))
        assert "may differ in their last bits from those before: cpu B, was cpu A" in caplog.text


@pytest.mark.parametrize("asked", [None, False])
def test_a_reproducible_job_does_not_lose_its_promise_unsaid(
    source: Path, output: Path, asked: bool | None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """By --noreproducible, or where the default is another: a machine without a compiler, a GPU."""
    from llama_dist.frontend.batch import identity

    monkeypatch.setattr(identity, "mode_of", lambda run, checked: "cpu A")
    finish(source, output, reproducible=True)
    monkeypatch.setattr(identity, "mode_of", lambda run, checked: None)
    if asked is None:
        release(opened(source, output))
        assert "may differ in their last bits from those before: none, as not reproducible, was cpu A" in caplog.text
        return
    with pytest.raises(ConfigError, match=r"numeric mode \(none, as not reproducible, was cpu A\)"):
        opened(source, output, reproducible=False)
    release(opened(source, output, reproducible=False, force=True))
    release(opened(source, output, reproducible=False))  # it promises nothing from now on


def test_an_output_that_is_no_batch_jobs_is_left_alone(source: Path, output: Path) -> None:
    output.write_text("my thesis\n")
    for force in (False, True):
        with pytest.raises(ConfigError, match="no results of a batch job"):
            opened(source, output, force=force)
    assert output.read_text() == "my thesis\n"


def test_results_without_their_fingerprint_need_force(source: Path, output: Path, whole: list[bytes]) -> None:
    finish(source, output)
    fingerprint_path(output).unlink()
    with pytest.raises(ConfigError, match="whose they are is not known"):
        opened(source, output)
    assert finish(source, output, force=True) and held(output) == whole


def test_a_result_beyond_the_input_is_never_dropped(source: Path, output: Path) -> None:
    finish(source, output)
    source.write_text("\n".join(source.read_text().split("\n")[:20]) + "\n")
    with pytest.raises(ConfigError, match=r"a result for line \d\d, which the input does not have"):
        opened(source, output, force=True)
    assert len(held(output)) == N - 1


def test_an_output_removed_is_a_job_begun_anew(source: Path, output: Path, whole: list[bytes]) -> None:
    finish(source, output)
    output.unlink()
    job = opened(source, output, seed=3)
    assert job.done == 0
    release(job)


def test_strict_names_the_first_bad_lines(source: Path, output: Path) -> None:
    source.write_text(source.read_text() + '{"prompt": "x", "n": 0}\n{}\n')
    with pytest.raises(
        ConfigError, match=r"has 4 bad lines: line 3: .*; line 8: its custom_id is on line 1 too; .* 1 more"
    ):
        opened(source, output, strict=True)
    assert not output.exists() and not list(output.parent.glob("*.lock"))


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"input_file": "none.jsonl"}, "cannot be read"),
        ({"input_file": "."}, "is a folder"),
        ({"output_file": "no/where/out"}, "there is no folder"),
        ({"output_file": "."}, "no regular file"),
        ({"output_file": "in.jsonl"}, "is the input file"),
    ],
)
def test_paths_that_cannot_work(
    source: Path, given: dict[str, str], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from llama_dist.frontend.batch.job import is_stream, output_path

    monkeypatch.chdir(source.parent)
    paths = {"input_file": "in.jsonl", "output_file": "out.jsonl", **given}
    with pytest.raises(ConfigError, match=words):
        output_path(options(Path(paths["input_file"]), Path(paths["output_file"])))
        is_stream(paths["input_file"])


def test_marks_are_those_of_records(source: Path, output: Path) -> None:
    finish(source, output)
    job = opened(source, output)
    assert [n for n in range(1, N + 1) if job.survey.marks[n] == FAILED] == [3, 8, 9]
    release(job)
