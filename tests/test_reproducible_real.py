"""SmolLM2 in bfloat16: the same file, logprobs to the last bit, on any number of ranks and with any batch.

By default a few requests on some of the worlds. All of it takes most of an hour: `./launch/test.sh -m matrix`.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests import assets
from tests.fault_ranks import run_command

pytestmark = [pytest.mark.spmd, pytest.mark.slow]
WORLDS = (1, 2, 3, 4, 5, 7, 8)
BATCHES = (1, 7, 64)
SUBJECTS = ("the sea", "bees", "a rainbow", "old trains", "the number seven", "bread", "Paris", "a long winter")


def requests(n: int, tokens: int) -> str:
    """Half of them greedy, half sampled; of different lengths, some of which begin alike."""
    lines = []
    for i in range(n):
        subject = SUBJECTS[i % len(SUBJECTS)]
        prompt = f"Here is a short text about {subject}. " * (1 + i // 8 % 3) + f"It has {i} words:"
        body = {"prompt": prompt, "max_tokens": tokens, "logprobs": 3, "seed": i, "ignore_eos": True}
        body |= {"temperature": 1.0, "top_p": 0.95} if i % 2 else {"temperature": 0.0}
        lines.append(json.dumps({"custom_id": f"r{i}", **body}) + "\n")
    return "".join(lines)


def answers(folder: Path, world: int, batch: int, within: float) -> bytes:
    output = folder / f"out-{world}-{batch}.jsonl"
    argv = ["batch", f"--ckpt_dir={assets.smollm2_gguf()}", f"--input_file={folder}/in.jsonl"]
    argv += [f"--output_file={output}", f"--max_batch_size={batch}", "--dtype=bfloat16", "--device=cpu"]
    argv += ["--reproducible", "--ordered", "--max_seq_len=256", "--log_every=0"]
    ended = run_command(world, argv, folder, within=within)
    assert ended.codes == [0] * world, ended.log
    return output.read_bytes()


def test_some_worlds_and_batches(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text(requests(10, 12))
    found = [answers(tmp_path, world, batch, 200) for world, batch in ((1, 64), (1, 1), (3, 7), (8, 64))]
    assert all(file == found[0] for file in found)
    assert len({json.loads(line)["response"]["body"]["choices"][0]["text"] for line in found[0].splitlines()}) == 10


@pytest.mark.matrix
@pytest.mark.timeout(7200)
def test_every_world_and_batch(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text(requests(64, 64))
    whole = answers(tmp_path, 1, 64, 600)
    assert whole.count(b"\n") == 64
    for world in WORLDS:
        for batch in BATCHES:
            assert answers(tmp_path, world, batch, 1800) == whole, f"{world} ranks, {batch} at once"
            print(f"{world} ranks, {batch} at once: the same file", flush=True)
