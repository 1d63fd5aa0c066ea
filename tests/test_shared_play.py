"""Several tasks on one output, without a model: whatever happens to one at any system call, each line is there once."""

from __future__ import annotations

import json
import random
import threading
from pathlib import Path
from typing import Any

import pytest

from llama_dist.errors import ConfigError
from llama_dist.frontend.batch import sharing
from llama_dist.frontend.batch.drain import Drain
from llama_dist.frontend.batch.identity import fingerprint_path
from llama_dist.frontend.batch.outfile import parts_of
from llama_dist.frontend.batch.sharing import folder_of, lines_in_block
from tests.batch_play import Killed, finish, opened, write_input
from tests.shared_play import Struck, Task, run_all

N = 16


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_input(tmp_path / "in.jsonl", N)


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "out.jsonl"


@pytest.fixture
def whole(source: Path, tmp_path: Path) -> bytes:
    """An uninterrupted ordered run's output, of one job alone."""
    path = tmp_path / "whole.jsonl"
    assert finish(source, path, ordered=True)
    return path.read_bytes()


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llama_dist.frontend.batch.desk.FLUSH_SECONDS", 0.0)
    monkeypatch.setattr("llama_dist.frontend.batch.desk.WAIT_SECONDS", 0.0)
    monkeypatch.setattr("llama_dist.frontend.batch.merging.POLL", 0.0)


def held(path: Path) -> list[bytes]:
    return sorted(path.read_bytes().splitlines(keepends=True))


def clean(output: Path) -> None:
    for path in output.parent.glob("out.jsonl*"):
        if path.is_dir():
            for inner in path.iterdir():
                inner.unlink()
            path.rmdir()
        else:
            path.unlink()


def left_over(output: Path) -> list[str]:
    usual = {output.name, fingerprint_path(output).name}
    return sorted(p.name for p in output.parent.glob("out.jsonl*") if p.name not in usual)


@pytest.mark.parametrize("n", [1, 2, 5])
@pytest.mark.parametrize("size", [1, 4])
def test_tasks_share_the_lines(
    source: Path, output: Path, whole: bytes, n: int, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sharing, "MOST_BLOCKS", N // size)
    assert lines_in_block(N) == size
    tasks = [Task(source, output, ordered=True) for _ in range(n)]
    run_all(*tasks)
    assert output.read_bytes() == whole and left_over(output) == []
    assert all(task.complete for task in tasks)
    assert sum(bool(task.counted) for task in tasks) == 1, "one merges"
    assert [found for task in tasks for found in task.counted] == [(N - 1, 3)]
    assert sum(task.answered for task in tasks) == answers_alone(source, output), "a line was computed twice"
    if n == 2:
        assert all(task.answered for task in tasks)


def answers_alone(source: Path, output: Path) -> int:
    """The requests that the input's lines need: what one task alone answers."""
    clean(output)
    alone = Task(source, output)
    run_all(alone)
    return alone.answered


def test_a_million_lines_have_some_thousand_blocks() -> None:
    assert lines_in_block(10**6) == 256 and 10**6 / 256 < 4096
    assert lines_in_block(1) == 1 and lines_in_block(4096) == 1 and lines_in_block(4097) == 2


def strike(source: Path, output: Path, monkeypatch: pytest.MonkeyPatch, at: int, kills: bool) -> tuple[Struck, Task]:
    """A task that dies with leases; two that take them over, one struck at its call `at`; and one that comes late."""
    dead = Task(source, output)
    next(dead.run())
    dead.bury()
    victim, other = Task(source, output, ordered=True), Task(source, output, ordered=True)
    rest = other.run()
    over = []

    def go_on() -> None:
        if not over and next(rest, "ended") == "ended":
            over.append(True)

    def act() -> None:
        if kills:
            raise Killed
        while not over:  # the victim stands still until the other has seen it lost, done its lines and merged
            go_on()

    struck = Struck(monkeypatch, at, act)
    ended = struck.run(victim, go_on)
    assert ended or kills
    while not over:
        go_on()
    assert other.complete
    late = Task(source, output, ordered=True)
    run_all(late)
    assert late.complete and late.answered == 0
    return struck, victim


@pytest.mark.parametrize("kills", [True, False], ids=["killed", "stopped"])
def test_struck_at_every_system_call(
    source: Path, output: Path, whole: bytes, kills: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed: the other takes its lines over. Stopped until the other has finished the job, then going on: no harm."""
    kinds: set[str] = set()
    for at in range(1, 400):
        clean(output)
        with monkeypatch.context() as patch:
            patch.setattr("llama_dist.frontend.batch.shared_lines.random", random.Random(0))
            struck, victim = strike(source, output, patch, at, kills)
        assert output.read_bytes() == whole, at
        assert left_over(output) == [], at
        if not kills:
            assert victim.complete, at
        if not struck.struck:
            break
        kinds.add(struck.struck)
    assert at > 100, f"only {at} calls were struck"
    assert kinds >= {"write part", "link lease", "rename lease", "unlink lease", "link done", "rename task"}, kinds
    assert kinds >= {"replace output", "rename leases"}, "it never merged"


@pytest.mark.parametrize("then", ["plain", "replicas", "shared", "retry"])
def test_all_killed_and_resumed_in_any_way(
    source: Path, output: Path, whole: bytes, then: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for at in (5, 12, 20, 40):
        clean(output)
        with monkeypatch.context() as patch:

            def die() -> None:
                raise Killed

            tasks = [Task(source, output), Task(source, output)]
            for task in tasks:
                assert not Struck(patch, at, die).run(task)
        if then == "shared":
            run_all(*(Task(source, output, ordered=True) for _ in range(3)))
        else:
            flags: dict[str, Any] = {"retry_failed": True} if then == "retry" else {}
            assert finish(source, output, ordered=True, replicas=2 if then == "replicas" else 1, **flags)
        assert output.read_bytes() == whole, at
        assert left_over(output) == [], at


@pytest.mark.parametrize("turn", range(N - 3))
def test_a_drained_task_gives_its_lines_back(
    source: Path, output: Path, whole: bytes, turn: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From whichever line it begins. Of a line of two answers one may be there when the other is called off: it alone
    is made again.
    """
    monkeypatch.setattr("llama_dist.frontend.batch.shared_lines.random.randrange", lambda n: turn % n)
    event = threading.Event()
    first = Task(source, output, drain=Drain(event, None, 0))
    run = first.run()
    for _ in range(2):
        next(run)
    event.set()
    run_all_of = list(run)
    assert first.complete is False and len(run_all_of) < 10
    assert list(folder_of(output).glob("*.done")) and not list(folder_of(output).glob("*.lease"))
    second = Task(source, output, ordered=True)
    run_all(second)
    assert second.complete and output.read_bytes() == whole
    again = first.answered + second.answered - answers_alone(source, output)
    assert again == first.halves, "a line was computed twice"


def test_results_that_vanish_are_missed_and_made_again(source: Path, output: Path, whole: bytes) -> None:
    a, b = Task(source, output, ordered=True), Task(source, output, ordered=True)
    runs = [a.run(), b.run()]
    for run in runs:
        next(run)
    next(runs[0])
    (part,) = [p for p in parts_of(output) if p.stat().st_size][:1]
    lost = part.read_bytes()
    assert lost
    part.unlink()  # the owner writes on to a file without a name
    for run in runs:
        list(run)
    assert not a.complete and not b.complete and not output.exists()
    run_all(Task(source, output, ordered=True))
    assert output.read_bytes() == whole and left_over(output) == []


def test_plain_and_shared_exclude_each_other(source: Path, output: Path) -> None:
    run = Task(source, output).run()
    next(run)
    with pytest.raises(ConfigError, match="is being written by tasks with --shared_output") as caught:
        opened(source, output)
    assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match="--retry_failed needs the output for itself"):
        opened(source, output, shared_output=True, retry_failed=True)
    list(run)
    plain = opened(source, output)
    with pytest.raises(ConfigError, match=r"is being written by pid \d+ on host \S+, which does not share it"):
        next(Task(source, output).run())
    assert plain.lock is not None
    plain.lock.release()
    assert left_over(output) == []


def test_tasks_of_two_jobs_do_not_mix(source: Path, output: Path) -> None:
    run = Task(source, output).run()
    next(run)
    with pytest.raises(ConfigError, match=r"differ in --seed \(2, was 1\)|differs in --seed \(2, was 1\)"):
        opened(source, output, shared_output=True, seed=2)
    list(run)


def test_all_tasks_have_the_date_of_the_first(source: Path, output: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = opened(source, output, shared_output=True)
    saved = json.loads(fingerprint_path(output).read_text())
    saved["began"] = "2020-01-01T00:00:00"
    agreed = folder_of(output) / "job.json"
    agreed.write_text(json.dumps(saved))
    second = opened(source, output, shared_output=True)
    assert second.began.year == 2020 and first.began.year > 2020
    assert json.loads(fingerprint_path(output).read_text())["began"] == "2020-01-01T00:00:00"
    for job in (first, second):
        assert job.lock is not None
        job.lock.release()


def test_retry_failed_alone_then_shared(source: Path, output: Path, whole: bytes) -> None:
    run_all(Task(source, output, ordered=True))
    job = opened(source, output, shared_output=True, retry_failed=True)
    assert (job.total - job.done, job.failed) == (3, 0)
    assert job.lock is not None
    second = opened(source, output, shared_output=True)
    assert second.lock is not None and second.total - second.done == 3
    job.lock.release()
    second.lock.release()
    run_all(Task(source, output, ordered=True))
    assert output.read_bytes() == whole
