"""The input of a batch job: one pass over it, its lines dealt in blocks, and when to stop taking them. No model."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from llama_dist.errors import ConfigError, LlamaDistError
from llama_dist.frontend.batch.blocks import block_size, claimed_lines, pack_survey, unpack_survey
from llama_dist.frontend.batch.drain import Drain, seconds_left
from llama_dist.frontend.batch.survey import BLANK, DONE, GRID, REPEATED, TODO, survey
from tests.batch_play import write_input

N = 40


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return write_input(tmp_path / "in.jsonl", N)


def test_survey_knows_each_line(tmp_path: Path) -> None:
    path = tmp_path / "in"
    lines = [f'{{"custom_id": "{i % 200}", "prompt": "{"x" * (i % 9)}"}}' for i in range(1, 301)]
    lines[9], lines[20] = "", '{"prompt": "no id"}'
    lines[50] = '{"prompt": "x", "custom_id": "line-21"}'  # what line 21 is called for want of another name
    path.write_text("\n".join(lines))
    found = survey(path)
    assert found.n_lines == 300 and found.n_bytes == path.stat().st_size
    assert [n for n, _ in found.lines(1, 301)] == list(range(1, 301))
    assert list(found.lines(64, 67)) == [(n, (lines[n - 1] + "\n").encode()) for n in (64, 65, 66)]
    repeated = [n for n in range(1, 301) if found.marks[n] == REPEATED]
    # 201 to 300 repeat 1 to 100, but for those whose first was replaced above
    assert repeated == [51, *(n for n in range(201, 301) if n - 200 not in (10, 21, 51))]
    assert found.first_of(51) == 21 and found.first_of(201) == 1 and found.first_of(300) == 100
    assert [n for n in range(1, 301) if found.marks[n] == BLANK] == [10]
    again = unpack_survey(json.loads(json.dumps(pack_survey(found))), path)
    assert (again.marks, again.starts, again.stamp) == (found.marks, found.starts, found.stamp)
    assert again.first_of(300) == 100 and list(again.lines(300, 301)) == list(found.lines(300, 301))


def test_an_input_that_changes_under_the_job_is_noticed(source: Path) -> None:
    found = survey(source)
    source.write_text(source.read_text() + "x\n")
    with pytest.raises(LlamaDistError, match="has changed while the job ran"):
        list(found.lines(1, 3))
    assert survey(source).digest != found.digest


def test_memory_is_a_few_bytes_a_line(tmp_path: Path) -> None:
    code = """if True:
        import sys, resource
        from llama_dist.frontend.batch.survey import survey
        from pathlib import Path
        survey(Path(sys.argv[1]))
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        found = survey(Path(sys.argv[2]))
        print(found.n_lines, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    """
    for name, n in (("small", 1000), ("large", 300_000)):
        with open(tmp_path / name, "w") as file:
            file.writelines(f'{{"custom_id": "request-{i}", "prompt": "the same words again"}}\n' for i in range(n))
    command = [sys.executable, "-c", code, str(tmp_path / "small"), str(tmp_path / "large")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    n, kilobytes = map(int, done.stdout.split())
    assert n == 300_000 and kilobytes < 9_000, f"{kilobytes} KB for {n} lines"


def test_blocks_are_dealt_once_each(source: Path) -> None:
    found = survey(source)
    for n in (4, 5, 17):
        found.marks[n] = DONE
    for size in (1, 4, GRID):
        turn = iter(range(10**6)).__next__
        streams = [claimed_lines(found, size, turn) for _ in range(3)]
        taken: list[int] = []
        dice = random.Random(size)
        while streams:
            stream = dice.choice(streams)
            number, raw = next(stream, (0, b""))
            if number:
                taken.append(number)
                assert raw == source.read_bytes().splitlines(keepends=True)[number - 1]
            else:
                streams.remove(stream)
        assert sorted(taken) == [n for n in range(1, N + 1) if found.marks[n] in (TODO, REPEATED)]
    assert block_size(10**6, 1) == block_size(10**6, 8) == GRID
    assert block_size(100, 2) == 4 and block_size(3, 8) == 1


def test_deadlines() -> None:
    now = [100.0]
    drain = Drain(threading.Event(), 10.0, 3.0, clock=lambda: now[0])
    seen = []
    for now[0] in (105.0, 110.0, 112.9, 113.0):
        seen.append((drain.due(), drain.over()))
    assert seen == [(False, False), (True, False), (True, False), (True, True)]
    assert seconds_left(7.0, 30.0, {"SLURM_JOB_END_TIME": "5"}) == 7.0
    assert seconds_left(None, 30.0, {}) is None
    assert seconds_left(None, 30.0, {"SLURM_JOB_END_TIME": "5"}) == 0.0
    with pytest.raises(ConfigError, match="SLURM_JOB_END_TIME"):
        seconds_left(None, 30.0, {"SLURM_JOB_END_TIME": "noon"})
