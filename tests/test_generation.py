"""Meta's API on several ranks and replicas: shapes, bounds, errors, logprobs, and ranks that do not agree."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests import reference
from tests.conftest import Saver
from tests.jobs import (
    Ask,
    answers,
    answers_of_a_mode_that_is_over,
    llama_calls,
    one_rank_samples_differently,
    other_flags,
    other_prompts,
    other_seed,
    slow_replica,
)
from tests.spmd import run_ranks

pytestmark = pytest.mark.spmd
CASE = "llama-gqa"


@pytest.fixture(scope="module")
def alone(checkpoint: Saver) -> dict[str, Any]:
    return run_ranks(1, llama_calls, str(checkpoint(CASE, "hf")), None)[0]


@pytest.mark.parametrize(
    ("world", "mp_size", "reproducible"),
    [(1, None, False), (2, None, None), (2, None, False), (3, 3, None), (3, 3, False), (4, 2, False), (2, 1, None)],
)
def test_any_world_and_any_replicas_answer_alike(
    checkpoint: Saver, alone: dict[str, Any], world: int, mp_size: int | None, reproducible: bool | None
) -> None:
    ranks = run_ranks(world, llama_calls, str(checkpoint(CASE, "hf")), mp_size, reproducible)
    assert all(r == ranks[0] for r in ranks)
    for key in ("greedy", "sampled", "again", "tokens", "text", "chat", "errors", "full"):
        assert ranks[0][key] == alone[key], key
    for mine, one in zip(ranks[0]["logprobs"], alone["logprobs"], strict=True):
        assert mine == pytest.approx(one, abs=1e-4)


def test_greedy_is_the_references_text(alone: dict[str, Any]) -> None:
    for ids, got in zip(alone["prompts"], alone["greedy"], strict=True):
        want = reference.hf_greedy(CASE, ids, 8, stop={1, 3})[0][len(ids) :]
        assert got == want
    assert alone["none"] is None


def test_sampling_depends_on_the_call_and_not_on_a_generator(alone: dict[str, Any]) -> None:
    assert alone["sampled"] != alone["again"], "two calls drew the same samples"
    assert alone["sampled"] != alone["greedy"]
    assert all(len(row) <= 8 for row in alone["sampled"])


def test_logprobs_while_generating_equal_those_of_one_pass(alone: dict[str, Any]) -> None:
    tokens, logprobs = alone["rescored"]
    assert tokens == alone["tokens"]
    for ids, new, once in zip(tokens, alone["logprobs"], logprobs, strict=True):
        assert len(new) == len(ids) == len(once)
        assert new == pytest.approx(once, abs=5e-5)  # float32 sums in another order; 1.05e-5 was seen
        assert new[0] == 0.0 and all(x < 0 for x in new[1:])


def test_echo_begins_with_the_prompt(alone: dict[str, Any]) -> None:
    for ids, row in zip(alone["prompts"], alone["tokens"], strict=True):
        assert row[: len(ids)] == ids


def test_shapes_of_the_text_calls(alone: dict[str, Any]) -> None:
    assert [set(p) for p in alone["text"]] == [{"generation"}] * 2
    (scored,) = alone["text_logprobs"]
    assert len(scored["tokens"]) == len(scored["logprobs"]) > 5
    assert scored["generation"].startswith("hello")
    (chat,) = alone["chat"]
    assert chat["generation"]["role"] == "assistant" and isinstance(chat["generation"]["content"], str)
    assert alone["nothing"] == ([], None)


def test_bounds(alone: dict[str, Any]) -> None:
    assert [len(row) for row in alone["full"]] == [0, 2], "max_seq_len bounds prompt and answer together"


def test_a_bad_prompt_is_a_request_error(alone: dict[str, Any]) -> None:
    empty, long, beyond, negative = alone["errors"]
    assert "empty" in empty[0] and empty[1] == "prompt"
    assert "65 tokens" in long[0] and "64" in long[0] and long[1] == "prompt"
    assert "1000000" in beyond[0] and "-1" in negative[0]


def test_neighbours_do_not_change_an_answer(checkpoint: Saver, alone: dict[str, Any]) -> None:
    folder, prompts = str(checkpoint(CASE, "hf")), alone["prompts"]
    asks = [Ask(folder, [ids], 8, params={"echo": False}) for ids in prompts]
    asks.append(Ask(folder, prompts, 8, {"max_batch_size": 1}, {"echo": False}))
    *single, one_slot = run_ranks(1, answers, asks)[0]
    assert [rows[0][0] for rows in single] == alone["greedy"] == [row[0] for row in one_slot]


def test_a_rank_that_samples_otherwise_is_named_everywhere(checkpoint: Saver) -> None:
    errors = run_ranks(3, one_rank_samples_differently, str(checkpoint(CASE, "hf")))
    assert errors[0] == errors[1] == errors[2]
    assert errors[0].startswith("rank 1 differs from the others in the tokens sampled up to tick 3")


def test_ranks_given_other_prompts_are_named_everywhere(checkpoint: Saver) -> None:
    errors = run_ranks(3, other_prompts, str(checkpoint(CASE, "hf")))
    assert errors[0] == errors[1] == errors[2]
    assert "rank 2" in errors[0] and "requests" in errors[0]


def test_ranks_with_other_flags_or_checkpoints_are_refused_at_start(checkpoint: Saver) -> None:
    errors = run_ranks(3, other_seed, str(checkpoint(CASE, "hf")))
    assert errors[0] == errors[1] == errors[2]
    assert "rank 1 has {'max_batch_size': 9, 'seed': 4}, the others {'max_batch_size': 8, 'seed': 3}" in errors[0]
    folders = [str(checkpoint(case, "hf")) for case in (CASE, "llama-tied", CASE)]
    (one, two, three) = run_ranks(3, other_flags, folders)
    assert one == two == three and "rank 1 has {'checkpoint': " in one


@pytest.mark.slow
def test_a_script_for_metas_package_runs_with_its_import_changed(checkpoint: Saver) -> None:
    folder = checkpoint("llama-meta", "meta2")
    root = Path(__file__).parent.parent
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += ["tests/meta_script.py", "--ckpt_dir", str(folder), "--tokenizer_path", str(folder / "tokenizer.model")]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=120, env=_env(root))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("==>") == 3, done.stdout
    assert done.stdout.count("Assistant:") == 1, "ranks above 0 printed too"


def _env(root: Path) -> dict[str, str]:
    import os

    return {**os.environ, "PYTHONPATH": str(root)}


def test_a_replica_may_take_longer_than_the_timeout(checkpoint: Saver) -> None:
    folder = str(checkpoint(CASE, "hf"))
    ranks = run_ranks(2, slow_replica, folder)
    assert ranks[0] == ranks[1] and [len(row) for row in ranks[0]] == [4, 4, 4]


def test_a_session_opened_in_inference_mode_outlives_it(checkpoint: Saver) -> None:
    ask = Ask(str(checkpoint(CASE, "hf")), [[5, 250, 17], [42]], 6)
    assert run_ranks(2, answers_of_a_mode_that_is_over, ask) == [ranks[0] for ranks in run_ranks(2, answers, [ask])]
