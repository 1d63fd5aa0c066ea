"""The same bits on any number of ranks and threads, alone or in any batch, in any chunks, preempted or not."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tests import tiny
from tests.batch_jobs import batch, killed
from tests.conftest import Saver
from tests.fault_ranks import run_command
from tests.reproducible_jobs import WAYS, every_way, from_python, refused
from tests.spmd import RankFailed, run_ranks

pytestmark = pytest.mark.spmd
N = 12
WORLDS = (1, 2, 3, 4, 5, 7, 8)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", ["llama-gqa", "llama-9-3"])
def test_any_world_and_any_batch(checkpoint: Saver, case: str, dtype: str) -> None:
    folder, vocab = str(checkpoint(case, "hf")), tiny.VOCAB
    expected = None
    for world in WORLDS:
        ways = list(WAYS) if world in (1, 3) else ["in chunks"]
        threads = 3 - world if world < 3 else 1
        for rank, found in enumerate(run_ranks(world, every_way, folder, dtype, ways, N, vocab, threads)):
            for way, (rows, preemptions) in found.items():
                expected = expected or rows
                assert rows == expected, f"rank {rank} of {world}, {way}"
                assert (preemptions > 0) == (way == "preempted"), way
    assert expected is not None and len({row[0] for row in expected}) == N


@pytest.mark.parametrize(("quantization", "dtype"), [("int8", "float32"), ("int4", "bfloat16"), ("fp8", "float32")])
def test_packed_weights(checkpoint: Saver, quantization: str, dtype: str) -> None:
    """Units of 8 and 19 columns: none of them is of whole groups."""
    folder = str(checkpoint("llama-gqa", "hf"))
    expected = None
    for world in (1, 2, 3, 5, 8):
        ways = list(WAYS) if world == 1 else ["in chunks" if world % 2 else "together"]
        job = (folder, dtype, ways, N, tiny.VOCAB, 3 - world if world < 3 else 1, None, quantization)
        for rank, found in enumerate(run_ranks(world, every_way, *job)):
            for way, (rows, _) in found.items():
                expected = expected or rows
                assert rows == expected, f"rank {rank} of {world}, {way}"
    [plain] = run_ranks(1, every_way, folder, dtype, ["together"], N, tiny.VOCAB, 1)
    assert plain["together"][0] != expected


BROKEN = {
    "the order of a sum": ("together", 3),
    "the tiling of rows": ("together", 1),
    "the borders of chunks": ("in chunks", 1),
    "where a number stands": ("together", 1),
}


@pytest.mark.parametrize("what", BROKEN)
def test_the_comparison_finds_what_is_broken(checkpoint: Saver, what: str) -> None:
    folder, (way, world) = str(checkpoint("llama-9-3", "hf")), BROKEN[what]
    [alone] = run_ranks(1, every_way, folder, "float32", ["alone"], N, tiny.VOCAB, 1, what)
    found = run_ranks(world, every_way, folder, "float32", [way], N, tiny.VOCAB, 1, what)[0]
    assert found[way][0] != alone["alone"][0]


@pytest.mark.parametrize("what", ["the product", "attention", "silu"])
def test_a_machine_that_cannot_keep_the_promise_refuses(checkpoint: Saver, what: str) -> None:
    said = run_ranks(2, refused, str(checkpoint("llama-9-3", "hf")), what)
    assert said[0] == said[1] and f"cannot be kept on rank 1: {what}" in said[0]


@pytest.mark.parametrize("case", sorted(set(tiny.CASES) - {"llama-gqa", "llama-9-3"}))
def test_every_flag(checkpoint: Saver, case: str) -> None:
    folder = str(checkpoint(case, "hf"))
    dtype = "bfloat16" if len(case) % 2 else "float32"
    [alone] = run_ranks(1, every_way, folder, dtype, ["alone"], N, tiny.VOCAB, 1)
    found = run_ranks(3, every_way, folder, dtype, ["in chunks"], N, tiny.VOCAB, 1)[2]
    assert found["in chunks"][0] == alone["alone"][0]


def test_the_python_api(checkpoint: Saver) -> None:
    folder = str(checkpoint("llama-9-3", "hf"))
    [alone] = run_ranks(1, from_python, folder)
    assert run_ranks(3, from_python, folder) == [alone] * 3


def test_killed_resumed_elsewhere_and_verified(checkpoint: Saver, tmp_path: Path) -> None:
    folder, source = str(checkpoint("llama-9-3", "hf")), tmp_path / "in.jsonl"
    asked = [
        {
            "custom_id": f"r{i}",
            "prompt": "to be or not " * (i % 4 + 1),
            "max_tokens": 3 + i % 7,
            "logprobs": 2,
            "seed": i,
        }
        for i in range(30)
    ]
    source.write_text("".join(json.dumps(line) + "\n" for line in asked))
    whole, output = tmp_path / "whole.jsonl", tmp_path / "out.jsonl"
    flags = ["--reproducible", "--ordered"]
    [done] = run_ranks(1, batch, folder, str(source), str(whole), flags)
    for world in (3, 2):
        with pytest.raises(RankFailed):
            run_ranks(world, killed, folder, str(source), str(output), ["--max_batch_size=4", *flags], 2, 0, False)
    run_ranks(2, batch, folder, str(source), str(output), ["--max_batch_size=3", "--model_parallel_size=1", *flags])
    assert output.read_bytes() == whole.read_bytes()
    receipts = {json.loads(line)["response"]["body"]["system_fingerprint"] for line in output.read_text().splitlines()}
    (receipt,) = receipts
    assert receipt.startswith("fp_") and re.search(f"^system fingerprint +{receipt}$", done.err, re.M)
    argv = ["verify", f"--ckpt_dir={folder}", f"--output_file={output}", "--device=cpu", "--sample=12"]
    assert run_command(2, argv, tmp_path).codes == [0, 0]
    assert "12 of 30 results computed again, all agree (fp_" in (tmp_path / "log").read_text()
    lines = output.read_text().splitlines(keepends=True)
    output.write_text("".join(line.replace('"text":"', '"text":"forged') for line in lines))
    assert run_command(1, argv, tmp_path).codes == [1]
    assert "differs from token 1 on" in (tmp_path / "log").read_text()
