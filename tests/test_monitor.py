"""What is watched during a batch job: rates, bar and log, status file, percentiles, summary, report."""

from __future__ import annotations

import html.parser
import io
import json
import logging
import os
import pickle
import random
import re
import socket
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from llama_dist.engine.stats import EngineStats
from llama_dist.errors import ConfigError
from llama_dist.frontend import monitor, progress
from llama_dist.frontend.monitor import Finished, Monitor
from llama_dist.frontend.series import CAPACITY
from llama_dist.frontend.status import write_status
from llama_dist.frontend.tally import Tally


@pytest.fixture(autouse=True)
def heard(monkeypatch: pytest.MonkeyPatch) -> None:
    """Log lines reach caplog, whatever the program's own set-up has done before."""
    monkeypatch.setattr(logging.getLogger("llama_dist"), "propagate", True)


class Clock:
    """Time that passes when told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def stats(
    tick: int, running: int = 8, waiting: int = 3, prompt: int = 100, new: int = 8, held: int = 30
) -> EngineStats:
    """After `tick` ticks that each computed so many tokens."""
    return EngineStats(running, waiting, tick * prompt, tick * new, tick * 25, held, 40, 2, tick)


def good(new_tokens: int = 10, seconds: float = 2.0) -> Finished:
    return Finished(50, new_tokens, seconds, ok=True)


BAD = Finished(50, 0, 0.0, ok=False)


def watch(clock: Clock, total: int | None = 100, status: Path | None = None, **more: Any) -> Monitor:
    return Monitor(total, status, more.pop("log_every", 0), more.pop("report", None), clock=clock, **more)


def run(watched: Monitor, clock: Clock, ticks: int, seconds: float, first: int = 1) -> None:
    """Ticks `first` and on, each so many seconds long, each ending one request."""
    for tick in range(first, first + ticks):
        clock.now += seconds
        watched.tick(stats(tick), [good()])


# ---- rates and their sums


def test_rates_are_those_of_the_last_seconds() -> None:
    clock = Clock()
    watched = watch(clock)
    run(watched, clock, 40, 0.5)
    assert watched.standing().prompt_rate == pytest.approx(200)
    assert watched.standing().new_rate == pytest.approx(16)
    run(watched, clock, 50, 0.25, first=41)  # 12.5 s at twice the speed: what was before is forgotten
    assert watched.standing().prompt_rate == pytest.approx(400)
    assert watched.tally.overall.prompt_tokens == pytest.approx(9000 / 32.5)


def test_a_long_tick_has_a_rate_too() -> None:
    clock = Clock()
    watched = watch(clock)
    run(watched, clock, 1, 30.0)
    assert watched.standing().new_rate == pytest.approx(8 / 30)
    run(watched, clock, 1, 60.0, first=2)
    assert watched.standing().new_rate == pytest.approx(8 / 60)


def test_time_left_counts_this_run_only() -> None:
    clock = Clock()
    watched = watch(clock, total=1000, started_done=600)
    assert watched.standing().left is None
    run(watched, clock, 100, 0.1)
    assert watched.standing().done == 700
    assert watched.standing().left == pytest.approx(30)


def test_the_mean_batch_is_one_over_time() -> None:
    clock = Clock()
    watched = watch(clock)
    clock.now += 1
    watched.tick(stats(1, running=2), [good(1), good(1), BAD])  # all in one tick, as in scoring
    assert watched.standing().running == 2
    clock.now += 3
    watched.tick(stats(2, running=6), [])
    assert watched.tally.overall.running == pytest.approx((1 * 2 + 3 * 6) / 4)
    assert watched.tally.busiest == 6


def test_memory_does_not_grow_with_ticks_and_requests(capsys: pytest.CaptureFixture[str]) -> None:
    tally, rng = Tally(), random.Random(1)
    fates = [good(rng.randrange(1, 2000), rng.lognormvariate(2, 2)) for _ in range(5000)]
    sizes, moment, ticks = [], stats(7), 1_000_000
    began = time.perf_counter()
    for tick in range(1, ticks + 1):
        tally.add(tick * 0.03, moment, (fates[tick % 5000],))
        if tick in (ticks // 10, ticks):
            sizes.append(len(pickle.dumps(tally)))
    per_tick = (time.perf_counter() - began) / ticks
    assert tally.done == ticks
    assert len(tally.series.samples) <= CAPACITY
    assert sizes[1] < 1.5 * sizes[0] < 200_000
    with capsys.disabled():
        print(f"\n  a tick with one request that ends: {1e6 * per_tick:.1f} us, {sizes[1] / 1000:.0f} kB held", end="")


# ---- status file

FACTS = {"done": 7, "failed": 2, "total": 100, "prompt_tokens": 300, "new_tokens": 24, "message": None}


def test_status_from_start_to_end(tmp_path: Path) -> None:
    clock, path = Clock(), tmp_path / "out.jsonl.status.json"
    watched = watch(clock, status=path, started_done=4, started_failed=1)
    first = json.loads(path.read_text())
    assert (first["state"], first["done"], first["failed"], first["total"]) == ("running", 4, 1, 100)
    assert (first["pid"], first["host"]) == (os.getpid(), socket.gethostname())
    assert abs(first["updated"] - time.time()) < 60
    run(watched, clock, 2, 0.6)
    clock.now += 1
    watched.tick(stats(3), [BAD])
    status = json.loads(path.read_text())
    assert {key: status[key] for key in FACTS} == FACTS
    assert status["tokens_per_second"] == pytest.approx(24 / 2.2, abs=0.01)
    assert list(status) == list(first)
    watched.close("completed")
    assert json.loads(path.read_text())["state"] == "completed"
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("state", ["preempted", "failed"])
def test_the_last_status_says_why_and_stands(tmp_path: Path, state: Any) -> None:
    clock, path = Clock(), tmp_path / "status.json"
    watched = watch(clock, status=path)
    watched.close(state, "rank 1 died: " + "x" * 5000)
    last = json.loads(path.read_text())
    assert last["state"] == state
    assert last["message"].startswith("rank 1 died: x")
    assert len(path.read_bytes()) < 4096
    run(watched, clock, 3, 5.0)  # ticks of another thread that come late, and a second end
    watched.close("completed")
    assert json.loads(path.read_text()) == last


def test_a_job_of_unknown_length_knows_it_at_the_end(tmp_path: Path) -> None:
    clock, path = Clock(), tmp_path / "status.json"
    watched = watch(clock, total=None, status=path)
    assert json.loads(path.read_text())["total"] is None
    run(watched, clock, 5, 1.0)
    watched.close("completed")
    assert json.loads(path.read_text())["total"] == 5


def test_status_is_written_once_a_second(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock, written = Clock(), []
    monkeypatch.setattr(monitor, "write_status", lambda path, status, last: written.append(status["done"]))
    run(watch(clock, status=tmp_path / "s"), clock, 1000, 0.01)
    assert len(written) in (10, 11)


def test_status_is_json_at_every_moment(tmp_path: Path) -> None:
    clock, path, seen, stop = Clock(), tmp_path / "status.json", set(), threading.Event()
    watched = watch(clock, status=path)
    faults: list[Exception] = []

    def read() -> None:
        while not stop.is_set():
            try:
                seen.add(json.loads(path.read_bytes())["done"])
            except Exception as err:
                faults.append(err)

    reader = threading.Thread(target=read)
    reader.start()
    run(watched, clock, 2000, 1.0)
    stop.set()
    reader.join()
    assert faults == []
    assert len(seen) > 3
    assert len(json.loads(path.read_text())) == 11


def test_no_room_for_a_second_file_leaves_the_last_status_true(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    clock, path = Clock(), tmp_path / "status.json"
    path.write_text("x" * 3000)
    watched = watch(clock, status=path)
    write_status(path, {"state": "running", "message": "y" * 600})
    (tmp_path / f".status.json.{socket.gethostname()}.{os.getpid()}.tmp").mkdir()  # so that no new file can be made
    run(watched, clock, 5, 1.0)
    assert json.loads(path.read_text())["message"] == "y" * 600
    assert len([r for r in caplog.records if "not up to date" in r.message]) == 1
    watched.close("failed", "no space left on device")
    last = json.loads(path.read_text())
    assert (last["state"], last["done"], last["message"]) == ("failed", 5, "no space left on device")


def test_an_end_while_a_tick_hangs_still_writes_the_status(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "status.json"
    monkeypatch.setattr(monitor, "CLOSE_WAIT", 0.05)
    watched = watch(Clock(), status=path)
    with watched._lock:
        watched.close("failed", "rank 2 died")
    assert json.loads(path.read_text())["state"] == "failed"


# ---- progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_log_lines_at_their_times(caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    with caplog.at_level(logging.INFO, logger="llama_dist"):
        watched = watch(clock, total=10_000, log_every=5.0)
        run(watched, clock, 80, 0.25)
    assert len(caplog.records) == 4
    assert caplog.records[0].message == (
        "20/10,000 done, running 8, waiting 3, 400 prompt and 32.0 new tokens/s, KV cache 75 %, 41:35 left"
    )
    caplog.clear()
    with caplog.at_level(logging.INFO, logger="llama_dist"):
        run(watch(clock, log_every=0), clock, 100, 10.0)
    assert not caplog.records


def test_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    clock, terminal = Clock(), Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with caplog.at_level(logging.INFO, logger="llama_dist"):
        watched = watch(clock, total=400, started_done=100, log_every=1.0)
        run(watched, clock, 200, 0.01)
        drawn = terminal.getvalue().split("\r")
        assert len([d for d in drawn if "left" in d]) in (9, 10)
        assert re.search(r"7[123]%\|.* 2[89]\d/400 ", drawn[-1])
        assert "s left, run 8, wait 3, in 10k out 800 tok/s, KV 75%" in drawn[-1]
        watched.close("preempted")
    assert "300/400 " in terminal.getvalue()
    assert "preempted" in terminal.getvalue()
    assert not caplog.records


def test_log_lines_go_above_the_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    logger = logging.getLogger("llama_dist")
    handler = logging.StreamHandler(terminal)
    monkeypatch.setattr(logger, "handlers", [handler])
    watched = watch(Clock())
    logger.warning("a word of warning")
    wiped, bar = terminal.getvalue().split("a word of warning\n")
    assert re.search(r"\r +\r$", wiped)
    assert "0/100 run 0" in bar
    watched.close("completed")
    assert logger.handlers == [handler]


def test_what_stands_behind_the_bar_fits_a_terminal() -> None:
    job = progress.Standing(1234567, 0, 10_000_000, 256, 512, 123456.0, 7890.0, 0.87, 36000.0)
    assert job.short == "10:00:00 left, run 256, wait 512, in 123k out 7.9k tok/s, KV 87%"
    assert len("12%|##| 1234567/10000000 " + job.short) < 100


# ---- summary and report


def finished_job(report: Path | None, clock: Clock) -> Monitor:
    watched = watch(clock, total=500, report=report, started_done=90)
    for tick in range(1, 401):
        clock.now += 0.1
        watched.tick(stats(tick, running=7), [good(20, 0.1 * tick)] if tick % 100 else [BAD])
    return watched


def test_summary(capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    finished_job(None, clock).close("preempted", "SIGTERM")
    lines = capsys.readouterr().err.splitlines()
    table = dict(re.split(r" {2,}", line, maxsplit=1) for line in lines[:10])
    assert table == {
        "state": "preempted: SIGTERM",
        "requests": "396 done, 4 failed, 90 done before, 10 left",
        "wall time": "40.0 s (10.0 requests/s)",
        "prompt tokens": "40,000 computed (1,000/s)",
        "new tokens": "3,200 (80.0/s)",
        "prefix cache": "10,000 prompt tokens found (20 %)",
        "mean request": "50.0 prompt and 20.0 new tokens",
        "batch": "mean 7.00, largest 7 sequences, 400 ticks",
        "KV cache": "mean 75 %, fullest 75 %",
        "preemptions": "2",
    }
    assert lines[10].split() == ["min", "p10", "p50", "p90", "p99", "max"]
    name, *values = re.split(r" {2,}", lines[11])
    assert name == "latency, s"
    assert [float(v) for v in values] == pytest.approx([0.1, 4, 20, 36, 39.6, 39.9], rel=0.02)
    assert lines[12].startswith("new tokens/s of a request")
    assert lines[12].endswith("200")
    assert "within 1 %" in lines[13]


def test_summary_of_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    watch(Clock(), total=0).close("completed")
    assert "0 done, 0 failed, 0 left" in capsys.readouterr().err


class Page(html.parser.HTMLParser):
    """Checks that tags close in order, and keeps what could fetch something, the sections' keys and the text."""

    VOID = frozenset({"meta", "br"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.references: list[str] = []
        self.sections: list[str] = []
        self.svgs: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        if tag not in self.VOID:
            self.open.append(tag)
        for name, value in attrs:
            if name.split(":")[-1] in ("href", "src", "srcset", "data", "action", "background"):
                self.references.append(str(value))
            self.references += re.findall(r"url\(([^)]*)\)", str(value))
        if tag == "section":
            self.sections.append(str(dict(attrs)["id"]))
        if tag == "svg":
            self.svgs.append(self.sections[-1])

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def read_page(path: Path) -> Page:
    page, text = Page(), path.read_text(encoding="utf-8")
    page.feed(text)
    assert page.open == []
    assert "://" not in text
    assert "@import" not in text
    assert all(reference.startswith("#") for reference in page.references)
    assert not page.tags & {"script", "link", "img", "iframe", "object", "image"}
    return page


def test_report_is_whole_and_fetches_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    clock, path = Clock(), tmp_path / "report.html"
    finished_job(path, clock).close("failed", "rank 1 <b> & died")
    page = read_page(path)
    assert page.sections == ["summary", "percentiles", "throughput", "batch", "kv", "latency"]
    assert page.svgs == ["throughput", "batch", "kv", "latency"]
    words = [
        "failed: rank 1 <b> & died",
        "40,000 computed",
        "p99",
        "generated tokens/s",
        "prompt tokens/s",
        "seconds since",
    ]
    words += ["running sequences", "waiting sequences", "pages held, %", "seconds from hand-over to end", "requests"]
    for word in words:
        assert word in page.text
    assert path.stat().st_size < 400_000


def test_report_of_a_job_without_a_tick(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    watch(Clock(), total=0, report=tmp_path / "r.html").close("completed")
    page = read_page(tmp_path / "r.html")
    assert page.text.count("Nothing to show.") == 4


def test_no_report_in_a_hurry(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    watch(Clock(), report=tmp_path / "r.html").close("failed", "second SIGTERM", hurry=True)
    assert list(tmp_path.iterdir()) == []


def test_a_report_that_cannot_be_is_refused_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="name a file in a directory that exists"):
        watch(Clock(), report=tmp_path / "nowhere" / "r.html")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ConfigError, match=r"pip install 'llama_dist\[report\]'"):
        watch(Clock(), report=tmp_path / "r.html")


def test_a_report_that_fails_costs_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    watched = watch(Clock(), report=tmp_path / "r.html")
    (tmp_path / "r.html").mkdir()
    watched.close("completed")
    assert "r.html is not written" in caplog.text


def test_what_a_tick_costs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With status file and all, at a true clock's pace; measured, not judged."""
    watched = Monitor(None, tmp_path / "s", 10.0, None)
    moment, none, n = stats(3), (), 200_000
    began = time.perf_counter()
    for _ in range(n):
        watched.tick(moment, none)
    with capsys.disabled():
        print(f"\n  a tick in which nothing ends: {1e6 * (time.perf_counter() - began) / n:.1f} us", end="")
    assert watched.tally.stats is moment
