"""Leases on blocks of lines: one owner each, lost with their owner, won by one. Plain files, real processes."""

from __future__ import annotations

import errno
import os
import random
import signal
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from llama_dist.errors import LlamaDistError
from llama_dist.frontend.batch import cards
from llama_dist.frontend.batch.cards import counts, others_alive
from llama_dist.frontend.batch.leases import Leases

LIFE = 20  # blocks claimed by a process that is killed
TIMEOUT = 60.0  # longer than any stall; where the clock is turned by hand no heartbeat comes by itself meanwhile


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "out.leases"
    path.mkdir()
    return path


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def join(folder: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Joins tasks of one process each that looks to the others like one of another host."""
    joined: list[Leases] = []

    def make(name: str, part: str = "") -> Leases:
        with monkeypatch.context() as patch:
            patch.setattr("llama_dist.frontend.batch.leases.space_of_pids", lambda: f"host of {name}")
            joined.append(Leases(folder, name, part or f"part-{name}", TIMEOUT, clock=clock))
        return joined[-1]

    yield make
    for leases in joined:
        leases.leave()


def watch(leases: Leases, clock: Clock, seconds: float) -> None:
    """Look every second for so long."""
    for _ in range(int(seconds)):
        clock.now += 1
        leases.look()


def test_one_owner_each_and_done_for_all(join: Any, clock: Clock, folder: Path) -> None:
    a, b = join("a"), join("b")
    assert a.claim("1") and not b.claim("1") and not a.claim("1") and b.claim("2")
    a.finish("1")
    assert not b.claim("1"), "another's claim stays taken until the next look"
    watch(b, clock, 3)
    assert b.done == {"1"} and not b.free("1") and not b.claim("1")
    assert a.claim("3") and not a.claim("2")
    assert {path.name for path in folder.glob("*.lease")} == {"2.lease", "3.lease"}


def test_done_since_the_last_look_is_not_done_again(join: Any, clock: Clock, folder: Path) -> None:
    a, b = join("a"), join("b")
    b.look()
    assert a.claim("1")
    a.finish("1")
    assert b.free("1") and not b.claim("1")
    assert not (folder / "1.lease").exists()


def test_leaving_gives_back(join: Any, clock: Clock, folder: Path) -> None:
    a, b = join("a", "out.part-a"), join("b")
    assert a.claim("1") and a.claim("2")
    a.finish("1")
    watch(b, clock, 3)
    assert not b.free("2") and b.ended_parts() == []
    a.leave()
    watch(b, clock, 3)
    assert b.ended_parts() == ["out.part-a"] and b.ended_parts() == []
    assert not b.claim("1") and b.claim("2")
    assert not others_alive(folder, "b") and others_alive(folder, "a")


def test_a_silent_owner_is_lost_after_the_timeout_and_not_before(join: Any, clock: Clock) -> None:
    a, b = join("a", "out.part-a"), join("b")
    assert a.claim("1")
    watch(b, clock, TIMEOUT - 2)
    a._beat()
    watch(b, clock, TIMEOUT - 2)
    assert not b.free("1") and not b.claim("1")
    watch(b, clock, 8)
    assert b.ended_parts() == ["out.part-a"]
    assert b.claim("1")


def test_a_look_that_comes_late_gives_nobody_up(join: Any, clock: Clock) -> None:
    a, b = join("a"), join("b")
    assert a.claim("1")
    watch(b, clock, 4)
    clock.now += 1000  # b was stopped, or the file server hung for both
    watch(b, clock, 3)
    assert not b.claim("1")


def test_the_longer_of_two_timeouts_holds(join: Any, clock: Clock, folder: Path) -> None:
    a = join("a")
    assert a.claim("1")
    hasty = Leases(folder, "hasty", "part-h", 1.0, clock=clock)
    watch(hasty, clock, TIMEOUT - 5)
    assert not hasty.claim("1")
    hasty.leave()


def test_who_was_given_up_joins_anew_and_takes_nothing_back(join: Any, clock: Clock, folder: Path) -> None:
    a, b, c = join("a"), join("b"), join("c")
    assert a.claim("1") and a.claim("2")
    watch(b, clock, TIMEOUT + 8)
    c._beat()
    assert b.claim("1")
    a.finish("2")  # a has woken, and its results are on disk after all
    assert (folder / "2.done").exists()
    a.look()
    assert not a.free("1") and not a.claim("1")
    a._drop("1")
    assert (folder / "1.lease").exists(), "b's lease is gone"
    assert a.claim("3") and a.holds("3") and b.holds("1")
    watch(c, clock, 3)
    assert not c.claim("1") and not c.claim("2") and not c.claim("3") and c.claim("4")


def test_two_that_take_over_at_once(join: Any, clock: Clock, folder: Path) -> None:
    a, b, c = join("a"), join("b"), join("c")
    assert a.claim("1")
    for _ in range(70):
        clock.now += 1
        b._beat()
        c._beat()
        b.look()
        c.look()
    assert b.free("1") and c.free("1")
    assert b.claim("1")
    assert not c.claim("1"), "c knows only that a, who had it, is gone"
    assert b.holds("1") and not c.holds("1")
    assert not list(folder.glob("*.old"))


def test_a_lease_that_is_put_back_does_not_outlive_its_block(
    join: Any, clock: Clock, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """c takes away what it thinks a's, who is gone, and is b's; b finishes before c has put it back."""
    a, b, c = join("a"), join("b"), join("c")
    assert a.claim("1")
    for _ in range(70):
        clock.now += 1
        b._beat()
        c._beat()
        b.look()
        c.look()
    assert b.claim("1")
    link = os.link

    def put_back(source: Path, target: Path) -> None:
        if target.name == "1.lease":
            assert not target.exists()
            b.finish("1")
        link(source, target)

    monkeypatch.setattr(os, "link", put_back)
    assert not c.claim("1")
    assert (folder / "1.done").exists() and not list(folder.glob("*.lease")) and not list(folder.glob("*.old"))


def test_a_dead_process_of_this_host_is_lost_at_once(folder: Path, clock: Clock) -> None:
    child = os.fork()
    if child == 0:
        Leases(folder, "child", "part-c", TIMEOUT).claim("1")
        os._exit(0)
    os.waitid(os.P_PID, child, os.WEXITED | os.WNOWAIT)  # it is a zombie now, of whom nothing more comes
    mine = Leases(folder, "me", "part-m", TIMEOUT, clock=clock)
    mine.look()
    assert mine.claim("1") and mine.ended_parts() == ["part-c"]
    os.waitpid(child, 0)
    mine.leave()


def test_a_pid_that_another_process_has_now(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mine = cards.Card("t", "h", "s", os.getpid(), cards.began(os.getpid()), "", 1.0)
    assert not cards.is_gone(mine, "s") and not cards.is_gone(mine, "another host's")
    assert cards.is_gone(cards.Card("t", "h", "s", os.getpid(), mine.began - 1, "", 1.0), "s")
    assert cards.is_gone(cards.Card("t", "h", "s", 2**22 + 1, 5, "", 1.0), "s")


def test_what_others_write_is_told(join: Any, clock: Clock, folder: Path) -> None:
    a, b = join("a"), join("b")
    a.count(3, 1)
    a._beat()
    assert sorted(counts(folder).values()) == [(0, 0), (3, 1)]
    watch(b, clock, 3)
    assert b.news() == (3, 1) and b.news() == (0, 0)
    a.count(2, 0)
    a.leave()
    watch(b, clock, 3)
    assert b.news() == (2, 0)
    late = Leases(folder, "late", "part-l", TIMEOUT, counts(folder), clock)
    late.look()
    assert late.news() == (0, 0)
    late.leave()


def test_the_end_of_the_folder_is_the_end_of_the_job(join: Any, clock: Clock, folder: Path) -> None:
    a, b = join("a"), join("b")
    assert a.claim("1")
    folder.rename(folder.with_name("gone"))
    assert not a.claim("2") and a.over
    a.finish("1")
    b.look()
    assert b.over
    assert Leases(folder, "late", "part", TIMEOUT).over


def test_no_hard_links_is_said(join: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    a = join("a")
    with monkeypatch.context() as patch:
        patch.setattr(os, "link", refuse)
        with pytest.raises(LlamaDistError, match="no hard link can be made here"):
            a.claim("1")


def _lines(log: Path) -> list[str]:
    return log.read_text().splitlines() if log.exists() else []


def _work(folder: Path, log: Path, seed: int, blocks: int, dying: list[Path]) -> None:
    """Claim and finish blocks until all are done; whose log is in `dying` is killed as it holds its last of `LIFE`."""
    dice = random.Random(seed)
    names = [str(block) for block in range(blocks)]
    leases = Leases(folder, f"task-{seed}", f"part-{seed}", TIMEOUT)  # the dead are told by their process
    fd = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    n = 0
    while True:
        leases.look()
        if leases.done >= set(names):
            break
        free = [name for name in names if leases.free(name)]
        waits = log not in dying and any(len(_lines(path)) < LIFE for path in dying)
        if waits and len(list(folder.glob("*.done"))) > blocks / 2:  # `free` is a view of a while ago
            free = []  # however late they begin, enough is left for those that are to die
        for name in dice.sample(free, min(len(free), 5)):
            if leases.claim(name):
                os.write(fd, f"{name}\n".encode())
                n += 1
                if log in dying and n == LIFE:
                    os.kill(os.getpid(), signal.SIGKILL)
                leases.finish(name)
        if not free:
            time.sleep(0.02)
    leases.leave()


def test_many_processes_that_race_and_some_that_die(folder: Path, tmp_path: Path) -> None:
    """Each block is done by one; the block that a killed process held is done by one more."""
    blocks, n, dying = 400, 8, 3
    logs = [tmp_path / f"log-{seed}" for seed in range(n)]
    children = []
    for seed, log in enumerate(logs):
        child = os.fork()
        if child == 0:
            try:
                _work(folder, log, seed, blocks, logs[:dying])
                os._exit(0)
            except BaseException:
                (tmp_path / f"error-{seed}").write_text(traceback.format_exc())
            finally:
                os._exit(1)
        children.append(child)
    ends = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    assert not [path.read_text() for path in tmp_path.glob("error-*")]
    assert ends == [-signal.SIGKILL] * dying + [0] * (n - dying)
    claimed = Counter(line for log in logs for line in _lines(log))
    held = {_lines(log)[-1] for log in logs[:dying]}
    assert set(claimed) == {str(block) for block in range(blocks)}, "blocks were lost"
    assert {name for name, times in claimed.items() if times > 1} == held
    assert all(claimed[name] == 2 for name in held)
    assert {path.stem for path in folder.glob("*.done")} == set(claimed) and not list(folder.glob("*.lease"))
