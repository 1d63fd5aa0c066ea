"""`bench` as it is run: alone and on ranks, its files, random weights, other programs in turn, lines of a file."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from llama_dist import cli
from llama_dist.checkpoint.open import open_checkpoint
from llama_dist.checkpoint.synthetic import RandomReader
from llama_dist.engine.plan import model_bytes
from llama_dist.errors import ConfigError, RequestError
from llama_dist.frontend.batch.records import records
from llama_dist.frontend.bench import against, rows
from llama_dist.frontend.bench.children import ChildFailed, last_words, words_of
from llama_dist.frontend.bench.command import check
from llama_dist.frontend.bench.figures import RATE, Figure, Limits
from llama_dist.frontend.bench.machine import About
from llama_dist.frontend.bench.results import Results
from llama_dist.frontend.options import CONTENDERS, BenchOptions
from llama_dist.model.shapes import SHAPES
from llama_dist.text.ids import ids_tokenizer
from tests.bench_jobs import bench, random_answers
from tests.conftest import Saver
from tests.spmd import run_ranks

PNG = b"\x89PNG\r\n\x1a\n"
EVERYTHING = {
    *(
        (name, size)
        for name, sizes in (("decode", (1, 8, 64)), ("sampled", (1, 64)), ("prefill", (512, 2048)))
        for size in sizes
    ),
    *((name, 0) for name in ("batch", "ready", "first token", "host memory")),
}
ROOT = Path(__file__).resolve().parent.parent
FAKE = """
def load(spec):
    print("BENCHMARKS are fun")
    assert spec["threads"] == int(__import__("os").environ["OMP_NUM_THREADS"])
    return f"fake 1.0, {spec['dtype']}"

def generate(prompts, n, temperature, top_p):
    print("noise", prompts[0][:2])
    __import__("time").sleep(0.001 * n)
    return [[0] * n for _ in prompts]
"""


def options(*words: str) -> BenchOptions:
    found = cli.parse(["bench", *words]).options
    assert isinstance(found, BenchOptions)
    return found


@pytest.mark.spmd
@pytest.mark.parametrize("n_ranks", [1, 2])
def test_every_figure_is_there_and_positive(n_ranks: int, tmp_path: Path) -> None:
    words = ["--shape", "tiny", "--repeats", "2", "--device", "cpu", "--check_every", "1"]
    (code, text, data), *others = run_ranks(n_ranks, bench, words, str(tmp_path))
    assert code == 0 and data is not None and data["version"] == 1
    assert [(code, text, data) for code, text, data in others] == [(0, "", None)] * (n_ranks - 1)
    figures = {(figure["name"], figure["size"]): figure for figure in data["figures"]}
    assert figures.keys() == EVERYTHING | {("decode of memory", 1)} | ({("reductions", 0)} if n_ranks > 1 else set())
    for key, figure in figures.items():
        in_rounds = key[0] in ("decode", "sampled", "prefill", "batch")
        assert len(figure["values"]) == (2 if in_rounds or key[0] == "decode of memory" else 1)
        assert 0 < figure["least"] <= figure["median"] <= figure["most"]
        assert (figure["share"] is not None) == (in_rounds or key[0] == "reductions")
        if in_rounds:
            assert figure["unit"] == "tokens/s" and figure["bound"] in ("memory", "product")
            assert figure["share"] == pytest.approx(figure["median"] / figure["limit"])
    assert figures["ready", 0]["median"] <= figures["first token", 0]["median"]
    assert all(data["limits"][name]["value"] > 0 and data["limits"][name]["how"] for name in ("read", "product"))
    assert (data["limits"]["reduction"]["value"] or 0) > 0 if n_ranks > 1 else True
    assert [item["what"] for item in data["left_out"]] == ["prefill of 8,192 tokens"]
    assert data["profiles"].keys() == {"1", "64"}
    for shares in data["profiles"].values():
        assert sum(shares.values()) == pytest.approx(1) and all(share >= 0 for share in shares.values())
        assert shares["products"] > 0 and shares["attention"] > 0
    about = data["about"]
    assert (about["ranks"], about["dtype"], about["torch"]) == (n_ranks, "bfloat16", torch.__version__)
    assert about["model"] == "tiny, random weights, llama, 148 k parameters"
    for part in (
        "decode, batch 64, tokens/s",
        "decode, batch 64, sampled",
        "decode, batch 1, of memory read in turn",
        "mixed batch of 64",
        "memory: read at",
        "left out: prefill of 8,192",
    ):
        assert part in text


@pytest.mark.spmd
def test_what_reproducible_sums_cost(tmp_path: Path) -> None:
    words = ["--shape=tiny", "--repeats=2", "--device=cpu", "--check_every=1", "--work=reproducible"]
    (code, text, data), _ = run_ranks(2, bench, words, str(tmp_path))
    assert code == 0 and data is not None
    figures = {(figure["name"], figure["size"]): figure["values"] for figure in data["figures"]}
    for key in (("reproducible decode", 1), ("reproducible decode", 64), ("reproducible prefill", 512)):
        assert len(figures[key]) == 2 and all(0.01 < share < 100 for share in figures[key])
    assert "decode, batch 64, reproducible / ordinary" in text


@pytest.mark.spmd
def test_growth_and_a_picture_on_a_checkpoint(checkpoint: Saver, tmp_path: Path) -> None:
    folder, plot = str(checkpoint("llama-gqa", "hf")), tmp_path / "out.png"
    words = ["--ckpt_dir", folder, "--work", "decode", "--repeats", "1", "--scale", f"--plot={plot}", "--device=cpu"]
    ((code, text, data), _) = run_ranks(2, bench, words, str(tmp_path))
    assert code == 0 and data is not None
    assert plot.read_bytes().startswith(PNG) and plot.stat().st_size > 10_000
    found = {(series["name"], series["axis"]): series for series in data["series"]}
    sizes = {key: [point["x"] for point in series["points"]] for key, series in found.items()}
    assert sizes == {
        ("decode", "sequences"): [1, 2, 4],
        ("prefill", "tokens of context"): [16, 32, 64],
        ("decode", "tokens of context"): [16, 32, 64],
        ("lines of a batch file, without the model", "lines"): [10, 20, 40],
    }
    for series in found.values():
        assert all(point["seconds"] > 0 and point["rate"] > 0 for point in series["points"])
        assert series["exponent"] is not None and series["steep"] == (series["exponent"] > 1.1)
    assert {item["what"] for item in data["left_out"]} == set()
    assert "tokens of context" in text


@pytest.mark.spmd
def test_random_weights_are_the_same_on_any_number_of_ranks() -> None:
    prompts = [[5, 250, 17], [42] * 20]
    (one,) = run_ranks(1, random_answers, "tiny", prompts)
    assert len(set(one[0][0])) > 1
    for found in run_ranks(3, random_answers, "tiny", prompts):
        for (tokens, logprobs, reason), (expected, their_logprobs, _) in zip(found, one, strict=True):
            assert (tokens, reason) == (expected, "length")
            assert logprobs == pytest.approx(their_logprobs, abs=1e-4)


def test_a_slice_of_random_weights_is_that_part_of_the_whole() -> None:
    reader = RandomReader(SHAPES["smollm2-135m"], 3, torch.device("cpu"))

    def read(name: str, *where: int) -> torch.Tensor:
        return torch.cat([piece.clone() for piece in reader.read(name, *where)])

    for name in ("layers.7.feed_forward.w2.weight", "tok_embeddings.weight"):
        whole = read(name)
        assert whole.shape == reader.tensors[name].shape
        assert torch.equal(read(name, 0, 100, 333), whole[100:333])
        assert torch.equal(read(name, 1, 64, 91), whole[:, 64:91])
        assert 0.0195 < whole.float().std() < 0.0205 and whole.float().mean().abs() < 1e-3
        assert len(whole[:3000].unique(dim=0)) == min(3000, len(whole))
        other = RandomReader(SHAPES["smollm2-135m"], 4, torch.device("cpu"))
        assert not torch.equal(next(iter(other.read(name, 0, 0, 5))), whole[:5])
    assert torch.equal(read("layers.0.ffn_norm.weight"), torch.ones(576, dtype=torch.bfloat16))
    assert not torch.equal(read("layers.0.attention.wk.weight"), read("layers.1.attention.wk.weight"))
    assert sum(info.file_bytes for info in reader.tensors.values()) == model_bytes(SHAPES["smollm2-135m"], 2)
    assert list(reader.read("norm.weight", 0, 5, 5)) == [] or read("norm.weight", 0, 5, 5).numel() == 0


def test_ids_are_their_own_text() -> None:
    tokenizer = ids_tokenizer(300)
    assert tokenizer.encode(" 17 4\n299", bos=True, eos=True) == [17, 4, 299]
    assert tokenizer.encode(tokenizer.decode([0, 299, 8]), bos=False, eos=False) == [0, 299, 8]
    for wrong in ("300", "-1", "x", "1.5", "٣"):
        with pytest.raises(RequestError, match="is no token id, must be from 0 to 299"):
            tokenizer.encode(wrong, bos=False, eos=False)


@pytest.mark.parametrize("n", [1, 63, 64, 65, 1000])
def test_rows_are_served_each_once_in_order(n: int, tmp_path: Path) -> None:
    source, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    rows.write_input(source, n)
    assert rows.serve_file(source, output) == n
    found = list(records(output))
    assert [record.line for record in found] == list(range(1, n + 1))
    assert not any(record.failed for record in found)
    bodies = [json.loads(record.raw)["response"]["body"] for record in found]
    assert {body["usage"]["completion_tokens"] for body in bodies} == {rows.NEW}


def test_a_contender_is_run_by_its_path_in_a_process_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(against.FILES, "fake", (str(tmp_path / "fake.py"), "json", ""))  # type: ignore[index]
    (tmp_path / "fake.py").write_text(FAKE)
    found = options("--shape", "tiny", "--dtype", "float32", "--device", "cpu")
    spec = against.spec_of(found, check(found.run, found)) | {"threads": 3}
    assert spec["model"] is None and spec["config"]["num_hidden_layers"] == 2 and spec["dtype"] == "float32"
    spec_file = tmp_path / "spec.json"
    spec_file.write_text(json.dumps(spec))
    about, values = against.contend("fake", sys.executable, spec_file, 3)
    assert about == "fake 1.0, float32"
    assert values.keys() == EVERYTHING and all(value > 0 for value in values.values())
    assert against.absent("fake", sys.executable) is None
    for name in ("vllm", "fake"):
        monkeypatch.setitem(against.FILES, name, ("x.py", "no_such_module", "pip install it"))  # type: ignore[index]
        why = against.absent(name, sys.executable)
        assert why is not None and "no_such_module is not installed" in why and "pip install it" in why


@pytest.mark.parametrize(
    ("code", "why"),
    [
        ("def load(spec):\n    raise ValueError('needs a\\nGGUF')", "ValueError: needs a GGUF"),
        (FAKE.replace("[0] * n", "[0]"), "asked for 1 answers of 2 tokens, got lengths"),
        ("import sys\nsys.exit('gone')", "gone"),
        ("import no_such_module", "ModuleNotFoundError: No module named 'no_such_module'"),
        ("import os\nos._exit(9)", "it ended with 9"),
    ],
)
def test_a_contender_that_cannot_says_why(code: str, why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(against.FILES, "fake", (str(tmp_path / "fake.py"), "json", ""))  # type: ignore[index]
    (tmp_path / "fake.py").write_text(code)
    found = options("--shape", "tiny", "--device", "cpu")
    (tmp_path / "spec.json").write_text(json.dumps(against.spec_of(found, check(found.run, found)) | {"threads": 1}))
    with pytest.raises(ChildFailed, match=why):
        against.contend("fake", sys.executable, tmp_path / "spec.json", 1)


def test_of_what_a_child_says_the_line_that_tells_most() -> None:
    by_torchrun = 'Traceback:\n  File "/torch/multiprocessing/errors/__init__.py", line 3\nChildFailedError: rank 1\n'
    assert (
        last_words("loading\nllama_dist: error: [rank 1] no room\n" + by_torchrun)
        == "llama_dist: error: [rank 1] no room"
    )
    assert last_words("loading\n" + by_torchrun) == "ChildFailedError: rank 1"
    assert last_words("loading\n  here\n") == "here" and last_words(" \n") == "it said nothing"


def test_rounds_are_in_turn_and_who_fails_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    turns: list[str] = []

    def ours(options: BenchOptions, ranks: int, work: Sequence[str]) -> Results:
        turns.append("llama_dist")
        assert options.run.dtype == "float32"
        figure = Figure("decode", 1, RATE, (float(len(turns)),), 10.0, "memory")
        about = About("m", "float32", "cpu", "p", 2, 2, 1, 1, "t", "l", "d", "c")
        return Results(about, [figure], Limits(1.0, 1.0, None, {"read": "", "product": ""}), [], {})

    def theirs(name: str, python: str, spec: Path, threads: int) -> tuple[str, dict[tuple[str, int], float]]:
        turns.append(name)
        if name == "vllm" and turns.count(name) == 2:
            raise ChildFailed("out of memory")
        return f"{name} 1", {("decode", 1): 0.5}

    monkeypatch.setattr(against, "ourselves", ours)
    monkeypatch.setattr(against, "contend", theirs)
    monkeypatch.setattr(against, "absent", lambda name, python: "not here" if name == "llama.cpp" else None)
    found = options("--shape", "tiny", "--against", "vllm,llama.cpp,transformers", "--dtype", "float32", "--device=cpu")
    results = against.compare(found, check(found.run, found))
    one_round = ["llama_dist", "vllm", "transformers"]
    assert turns == [*one_round, *one_round, "llama_dist", "transformers"]
    assert results.figures[0].values == (1.0, 4.0, 7.0)
    assert [(c.name, c.values, c.ratio(results.figures[0])) for c in results.contenders] == [
        ("vllm", {("decode", 1): [0.5]}, 8.0),
        ("transformers", {("decode", 1): [0.5] * 3}, 8.0),
    ]
    assert list(results.left_out) == [("llama.cpp", "not here"), ("vllm", "out of memory")]


@pytest.mark.slow
@pytest.mark.parametrize("form", ["hf", "shape"])
def test_transformers_does_the_work(form: str, checkpoint: Saver, tmp_path: Path) -> None:
    if form == "shape":
        found = options("--shape", "tiny", "--dtype", "float32", "--device", "cpu")
    else:
        path = checkpoint("llama-gqa", form)
        found = options(f"--ckpt_dir={path}", "--dtype", "float32", "--device", "cpu")
    spec = against.spec_of(found, check(found.run, found))
    greedy = {"temperature": 0.0, "top_p": 1.0}
    jobs = [{"name": "decode", "size": 2, "prompts": [[5, 6], [7, 8, 9]], "new": 16} | greedy]
    jobs += [{"name": "prefill", "size": 64, "prompts": [[5] * 64], "new": 1} | greedy]
    jobs += [{"name": "batch", "size": 0, "prompts": [[5, 6], [7] * 20, [8]], "new": 4} | greedy]
    jobs += [{"name": "sampled", "size": 2, "prompts": [[5, 6], [7]], "new": 16, "temperature": 0.6, "top_p": 0.9}]
    (tmp_path / "spec.json").write_text(json.dumps(spec | {"jobs": jobs, "threads": 1}))
    about, values = against.contend("transformers", sys.executable, tmp_path / "spec.json", 1)
    assert about.startswith("transformers ") and about.endswith("float32")
    assert {("ready", 0), ("first token", 0), ("prefill", 64), ("batch", 0), ("host memory", 0)} <= values.keys()
    assert all(value > 0 for value in values.values())


def test_transformers_answers_do_not_depend_on_the_filling(checkpoint: Saver) -> None:
    from llama_dist.frontend.bench.contenders import with_transformers as contender

    folder = str(checkpoint("llama-gqa", "hf"))
    contender.load({"model": folder, "dtype": "float32", "device": "cpu", "threads": 1})
    prompts = [[5, 6, 7], [8] * 11, [9, 10]]
    together = contender.generate(prompts, 5, 0.0, 1.0)
    assert together == [contender.generate([prompt], 5, 0.0, 1.0)[0] for prompt in prompts]
    assert [len(answer) for answer in together] == [5, 5, 5]


def test_a_child_is_told_what_its_parent_was() -> None:
    words = ["--shape=tiny", "--max_seq_len=300", "--kv_cache_memory=5MB", "--reproducible=True", "--quantization=int8"]
    found = options(*words, "--repeats=7", "--json=x")
    again = options(*words_of(found, ["decode"]))
    assert again.run == found.run and again.shape == "tiny"
    assert (again.work, again.repeats, again.json) == (("decode",), 1, None)


def test_every_contender_has_its_file() -> None:
    assert against.FILES.keys() == set(CONTENDERS)
    assert {file for file, _, _ in against.FILES.values()} < {path.name for path in against.FOLDER.iterdir()}


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["--plot=/no/such/folder/x.png"], "--plot /no/such/folder/x.png cannot be written"),
        (["--json=/tmp"], "--json /tmp cannot be written"),
        (["--against=vllm=/no/python"], "--against vllm=/no/python: no Python can be run at /no/python"),
    ],
)
def test_what_cannot_be_done_is_refused_before_anything_is_loaded(words: list[str], part: str) -> None:
    with pytest.raises(ConfigError, match=part):
        cli.prepare(cli.parse(["bench", "--shape=tiny", *words]), 1)


def test_ranks_and_contenders_exclude_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match="run it as one process, no launcher"):
        cli.prepare(cli.parse(["bench", "--shape=tiny", "--against=transformers"]), 2)


def test_the_start_of_a_process_is_known_before_its_first_line() -> None:
    code = "from llama_dist.frontend.bench.machine import since_start; print(since_start())"
    before = "import time; time.sleep(0.5); "
    out = [
        subprocess.run([sys.executable, "-c", c], cwd=ROOT, capture_output=True, text=True, check=True).stdout
        for c in (before + code,)
    ]
    assert 0.5 <= float(out[0]) < 300


def test_a_model_of_no_such_shape_leaves_the_checkpoint_path_alone(checkpoint: Saver) -> None:
    folder = checkpoint("llama-gqa", "hf")
    found = options(f"--ckpt_dir={folder}")
    checked = check(found.run, found)
    assert checked.max_seq_len == open_checkpoint(folder).config.max_position


def test_a_child_ends_with_its_parent(tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    child = f"import os, time; open({str(pid_file)!r}, 'w').write(str(os.getpid()) + '.'); time.sleep(300)"
    code = f"from llama_dist.frontend.bench.children import run_child; run_child([{sys.executable!r}, '-c', {child!r}])"
    parent = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT)
    deadline = time.monotonic() + 120
    while not (pid_file.exists() and pid_file.read_text().endswith(".")) and time.monotonic() < deadline:
        time.sleep(0.05)
    pid = int(pid_file.read_text().rstrip("."))
    parent.kill()
    parent.wait()
    while Path(f"/proc/{pid}").exists() and _state(pid) != "Z" and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not Path(f"/proc/{pid}").exists() or _state(pid) == "Z"


def _state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0]
    except OSError:
        return "Z"
