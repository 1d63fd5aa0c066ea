"""The command line: what is refused and how, what reaches the options unchanged, and what the help tells."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from llama_dist import __main__, cli
from llama_dist.config import RunConfig
from llama_dist.errors import ConfigError
from llama_dist.flags import FLAG, flags_of
from llama_dist.frontend.options import RENAMED, SHARED_HELP, GenerateOptions
from llama_dist.request import SamplingParams
from tests.conftest import Saver

ROOT = Path(__file__).resolve().parent.parent
LEAST = {
    "generate": ["--ckpt_dir", "x", "--prompt", "hi"],
    "chat": ["--ckpt_dir", "x"],
    "batch": ["--ckpt_dir", "x", "--input_file", __file__, "--output_file", "o"],
    "verify": ["--ckpt_dir", "x", "--output_file", "o"],
    "bench": ["--ckpt_dir", "x"],
    "inspect": ["--ckpt_dir", "x"],
    "plan": ["--ckpt_dir", "x", "--gpus", "2", "--gpu_memory", "80GB"],
    "convert": ["--ckpt_dir", "x", "--out_dir", "y"],
    "doctor": [],
}
ALL_FLAGS = [(command, name) for command, cls in cli.COMMANDS.items() for name in flags_of(cls)]


def generate(*words: str) -> GenerateOptions:
    options = cli.parse(["generate", "--ckpt_dir", "x", *words]).options
    assert isinstance(options, GenerateOptions)
    return options


def refusal(*argv: str) -> str:
    with pytest.raises(ConfigError) as caught:
        cli.parse(list(argv))
    message = str(caught.value)
    assert "\n" not in message
    return message


def start(*argv: str, stdin: str = "", **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "llama_dist", *argv],
        input=stdin,
        capture_output=True,
        text=True,
        timeout=120,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", **env},
    )


def test_every_command_has_a_case_here() -> None:
    assert LEAST.keys() == cli.COMMANDS.keys()
    assert cli.ON_RANKS.issubset(cli.COMMANDS)


@pytest.mark.parametrize("command", LEAST)
def test_the_least_line_takes_every_default_from_the_dataclasses(command: str) -> None:
    options = cli.parse([command, *LEAST[command]]).options
    assert dataclasses.replace(options.run, ckpt_dir="x") == RunConfig("x")
    assert getattr(options, "sampling", SamplingParams()) == SamplingParams()


@pytest.mark.parametrize(("command", "name"), ALL_FLAGS)
def test_a_mistyped_flag_is_refused_and_the_right_one_named(command: str, name: str) -> None:
    wrong = name[:-2] + name[-1] + name[-2] if name[-1] != name[-2] else name + "x"
    assert wrong not in flags_of(cli.COMMANDS[command])
    message = refusal(command, *LEAST[command], f"--{wrong}", "1")
    assert f"{command} has no flag --{wrong}; did you mean --{name}?" == message


@pytest.mark.parametrize("command", LEAST)
def test_a_missing_required_flag_is_named(command: str) -> None:
    words = LEAST[command]
    for i in range(0, len(words), 2):
        if words[i] != "--prompt":
            assert f"{command} needs {words[i]} " in refusal(command, *words[:i], *words[i + 2 :])


@pytest.mark.parametrize(
    ("line", "part"),
    [
        ("", "no command: choose generate, chat, batch, verify, bench, inspect, plan, convert, doctor"),
        ("genrate", "no command 'genrate'; did you mean generate?"),
        ("xyzzy", "choose generate, chat"),
        ("--ckpt_dir x", "no command '--ckpt_dir'"),
        ("generate --ckpt_dir x --xyzzy", "see `llama_dist generate --help`"),
        ("generate --ckpt_dir x --prompt", "--prompt has no value: write --prompt TEXT"),
        ("generate --ckpt_dir --prompt hi", "--ckpt_dir has no value: write --ckpt_dir DIR"),
        ("generate --ckpt_dir= --prompt hi", "--ckpt_dir is '', must be a path"),
        ("generate --ckpt_dir x --prompt hello world", "unexpected 'world'"),
        ("generate x --prompt hello", "unexpected 'x'"),
        ("generate --ckpt_dir x --prompt hi -t 1", "unexpected '-t'"),
        ("generate --ckpt_dir x --prompt hi --", "unexpected '--'"),
        ("generate --ckpt_dir x --prompt hi --seed one", "--seed is 'one', must be a whole number"),
        ("generate --ckpt_dir x --prompt hi --seed 1.5", "--seed is '1.5', must be a whole number"),
        ("generate --ckpt_dir x --prompt hi --seed=-1", "--seed is -1, must be from 0"),
        ("generate --ckpt_dir x --prompt hi --seed 1 --seed 2", "--seed is given 2 times"),
        ("generate --ckpt_dir x --prompt hi --temperature warm", "--temperature is 'warm', must be a number"),
        ("generate --ckpt_dir x --prompt hi --temperature -1", "--temperature is -1.0, must be 0 or more"),
        ("generate --ckpt_dir x --prompt hi --temperature nan", "--temperature is nan, must be 0 or more"),
        ("generate --ckpt_dir x --prompt hi --top_p 2", "--top_p is 2.0, must be from 0 to 1"),
        ("generate --ckpt_dir x --prompt hi --max_gen_len -3", "--max_gen_len is -3, must be 0 or more"),
        ("generate --ckpt_dir x --prompt hi --echo=maybe", "--echo is 'maybe', must be true or false"),
        ("generate --ckpt_dir x --prompt hi --noseed", "no flag --noseed"),
        ("generate --ckpt_dir x --prompt hi --dtype int8", "--dtype is 'int8', must be one of auto"),
        ("generate --ckpt_dir x --prompt hi --model_parallel_size 0", "--model_parallel_size is 0, must be"),
        ("generate --ckpt_dir x", "no prompt: give --prompt TEXT or --prompts_file FILE"),
        ("generate --ckpt_dir x --prompt hi --prompts_file f", "exclude each other"),
        ("generate --ckpt_dir x --prompt hi --logprobs", "add --json"),
        ("chat --ckpt_dir x --logprobs", "chat has no flag --logprobs"),
        ("bench", "bench needs --ckpt_dir DIR or --shape TEXT: checkpoint"),
        ("bench --ckpt_dir x --shape tiny", "--ckpt_dir and --shape exclude each other"),
        ("bench --shape llama-9t", "--shape is 'llama-9t', must be one of tiny, smollm2-135m"),
        ("bench --shape tiny --against vlm", "--against is 'vlm', must be some of transformers,llama.cpp,vllm"),
        ("bench --shape tiny --against vllm,vllm=x", "--against is 'vllm,vllm=x', must be some of"),
        (
            "bench --shape tiny --work decode,sleep",
            "--work is 'decode,sleep', must be some of decode,sampled,prefill,batch,reproducible",
        ),
        ("bench --shape tiny --repeats 0", "--repeats is 0, must be 1 or more"),
        ("bench --shape tiny --scale --against vllm", "exclude each other; make two runs"),
        ("plan --ckpt_dir x --gpus 0 --gpu_memory 1GB", "--gpus is '0', must be a whole number from 1"),
        ("plan --ckpt_dir x --gpus 2,x --gpu_memory 1GB", "--gpus is '2,x'"),
        ("plan --ckpt_dir x --gpus 2 --gpu_memory 80", "such as 80GB"),
        ("plan --ckpt_dir x --gpus 3 --gpu_memory 80GB,40GB", "lists 2 sizes for --gpus 3"),
        ("convert --ckpt_dir x --out_dir y --format gguf", "--format is 'gguf', must be one of hf, meta"),
        ("convert --ckpt_dir x --out_dir y --model_parallel_size 2", "is for --format meta"),
    ],
)
def test_refusals(line: str, part: str) -> None:
    assert part in refusal(*shlex.split(line))


@given(st.text(), st.booleans())
@example("1,2", False)
@example("{'a': 1}", False)
@example("None", False)
@example("-", False)
@example("-1", False)
@example("--help me, please", False)
@example("--", True)
@example("--echo", True)
@example("a=b\nc=d", True)
@example("[INST] hi", False)
@example('["a", 1]', False)
def test_a_text_stays_the_text_it_was(text: str, joined: bool) -> None:
    if re.match(r'\s*\[\s*"', text):
        text = "x" + text  # what may be a JSON list has its own test
    if joined or FLAG.fullmatch(text):
        assert generate(f"--prompt={text}").prompt == (text,)
    else:
        assert generate("--prompt", text).prompt == (text,)


@given(st.lists(st.text(), min_size=2, max_size=5))
@example(['["a"]', "b"])
def test_several_prompts_by_repetition_or_as_a_list(prompts: list[str]) -> None:
    assert generate(*(f"--prompt={p}" for p in prompts)).prompt == tuple(prompts)
    assert generate("--prompt", json.dumps(prompts)).prompt == tuple(prompts)


@pytest.mark.parametrize(
    ("words", "echo"),
    [
        ("--echo", True),
        ("--noecho", False),
        ("--echo=true", True),
        ("--echo=False", False),
        ("--echo false", False),
        ("--echo --json", True),
    ],
)
def test_yes_or_no_flags(words: str, echo: bool) -> None:
    assert generate("--prompt", "x", *words.split()).sampling.echo is echo


def test_values_reach_their_places() -> None:
    line = (
        "--tokenizer-path t --max-seq-len 7 --max_batch_size=2 --max_batch_tokens 30 --kv_cache_memory 4GB "
        "--noprefix_caching --model_parallel_size 3 --units 9 --seed 4 "
        "--dtype float32 --quantization int8 --device cpu --chat_format chatml --timeout 1.5 --check_every 2 --verbose "
        "--temperature 0 --top_p .5 --max_gen_len 6 --logprobs --echo --prompts_file p --chat --json"
    )
    options = generate(*line.split())
    assert options.run == RunConfig(
        ckpt_dir="x",
        tokenizer_path="t",
        max_seq_len=7,
        max_batch_size=2,
        max_batch_tokens=30,
        kv_cache_memory=4 * 10**9,
        prefix_caching=False,
        model_parallel_size=3,
        units=9,
        seed=4,
        dtype="float32",
        quantization="int8",
        device="cpu",
        chat_format="chatml",
        timeout=1.5,
        check_every=2,
        verbose=True,
    )
    assert options.sampling == SamplingParams(0.0, 0.5, 6, True, True)
    assert (options.prompt, options.prompts_file, options.chat, options.json) == ((), "p", True, True)
    assert generate("--prompt", "x", "--max_seq_len", "none").run.max_seq_len is None


def test_plan_takes_lists() -> None:
    line = "plan --ckpt_dir x --gpus 1,2,8 --gpu_memory 79.5GiB"
    options = cli.parse(line.split()).options
    assert (options.gpus, options.gpu_memory) == ((1, 2, 8), (int(79.5 * 2**30),))
    options = cli.parse(shlex.split("plan --ckpt_dir x --gpus 2 --gpu_memory '80GB, 40 gb'")).options
    assert options.gpu_memory == (80 * 10**9, 40 * 10**9)


def test_every_field_of_run_and_sampling_has_its_help() -> None:
    shared = {
        f.name: f.metadata["names"] for f in dataclasses.fields(cli.COMMANDS["generate"]) if "names" in f.metadata
    }
    names = [f.name for f in dataclasses.fields(RunConfig)] + list(shared["sampling"])
    assert {RENAMED.get(name, name) for name in names} == set(SHARED_HELP)


@pytest.mark.parametrize("command", LEAST)
def test_help_lists_every_flag_with_its_default(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert __main__.main([command, "--help"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert max(map(len, out.splitlines())) <= 101
    flat = " ".join(out.split())
    for name, flag in flags_of(cli.COMMANDS[command]).items():
        assert re.search(rf"^  --{name} ", out, re.MULTILINE)
        assert flag.help in flat
        if flag.default not in (None, (), dataclasses.MISSING):
            default = ",".join(flag.default) if isinstance(flag.default, tuple) else str(flag.default)
            assert f"[default: {default.lower() if flag.type is bool else default}]" in flat


@pytest.mark.parametrize("argv", [["--help"], ["-h"], ["help"]])
def test_help_of_the_program_names_the_commands(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert __main__.main(argv) == 0
    out = capsys.readouterr().out
    assert all(re.search(rf"^  {command} ", out, re.MULTILINE) for command in cli.COMMANDS)


def test_a_usage_error_is_one_line_and_does_not_wait_for_torch() -> None:
    code = "import sys; from llama_dist.__main__ import main as m; print(m(sys.argv[1:]), 'torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code, "generate", "--promt", "x"], capture_output=True, text=True, cwd=ROOT, timeout=60
    )
    assert done.stdout == "2 False\n"
    assert done.stderr == "llama_dist: error: generate has no flag --promt; did you mean --prompt?\n"


def test_of_several_ranks_only_the_first_complains(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(__main__, "MUTE_RANK_WAITS", 0.0)
    for rank, lines in ((0, 1), (1, 0)):
        monkeypatch.setenv("RANK", str(rank))
        assert __main__.main(["chat", "--ckpt", "x"]) == 2
        assert capsys.readouterr().err.count("\n") == lines


@pytest.mark.parametrize("command", [name for name in LEAST if name != "doctor"])  # to which it is a finding
def test_a_missing_checkpoint_is_refused_before_any_group(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["none" if word == "x" else word for word in LEAST[command]]
    monkeypatch.chdir(tmp_path)
    assert __main__.main([command, *words]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    missing = "no o.job.json" if command == "verify" else "none"  # verify asks for the job first
    assert err.startswith("llama_dist: error: ") and missing in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (None, "cannot be read: No such file"),
        (b"", "holds no prompt"),
        (b" \n\n", "holds no prompt"),
        (b"ok\n\xff", "no UTF-8 text at byte 3"),
        (b'{"prompt": "a"}\nb\n', "line 2: must be a JSON object"),
        (b'{"prompt": 5}\n', "line 1: must be a JSON object"),
    ],
)
def test_a_prompts_file_is_refused_before_any_group(
    content: bytes | None, part: str, checkpoint: Saver, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "prompts"
    if content is not None:
        path.write_bytes(content)
    folder = str(checkpoint("llama-gqa", "hf"))
    assert __main__.main(["generate", "--ckpt_dir", folder, "--prompts_file", str(path)]) == 2
    err = capsys.readouterr().err
    assert part in err and err.count("\n") == 1


@pytest.mark.parametrize("command", sorted(cli.COMMANDS.keys() - cli.ON_RANKS))
def test_what_is_one_process_refuses_a_launcher(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    assert __main__.main([command, *LEAST[command]]) == 2
    assert f"{command} is one process" in capsys.readouterr().err


def test_inspect_tells_what_the_files_say(checkpoint: Saver, capsys: pytest.CaptureFixture[str]) -> None:
    folder = checkpoint("smollm2", "hf")
    config = json.loads((folder / "config.json").read_text())
    header = (folder / "model.safetensors").read_bytes()
    tensors = json.loads(header[8 : 8 + int.from_bytes(header[:8], "little")])
    tensors.pop("__metadata__", None)
    numbers = sum(math.prod(t["shape"]) for t in tensors.values())
    assert __main__.main(["inspect", "--ckpt_dir", str(folder), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["parameters"] == numbers
    assert facts["bytes"] == 4 * numbers
    assert facts["config"]["n_layers"] == config["num_hidden_layers"]
    assert facts["shapes"]["layers.*.attention.wk.weight"] == [24, 72]
    assert facts["tokenizer"]["stop_ids"] == [1, 3]
    assert facts["tokenizer"]["chat_format"] == "template"
    assert facts["auto_dtype"] == "float32"
    assert __main__.main(["inspect", "--ckpt_dir", str(folder)]) == 0
    assert f"{numbers:,}, embeddings tied" in capsys.readouterr().out


def test_inspect_without_a_tokenizer(checkpoint: Saver, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("config.json", "model.safetensors"):
        os.link(checkpoint("llama-gqa", "hf") / name, tmp_path / name)
    assert __main__.main(["inspect", "--ckpt_dir", str(tmp_path)]) == 0
    assert "none here; give --tokenizer_path" in capsys.readouterr().out


def test_convert_takes_the_tokenizer_along(checkpoint: Saver, tmp_path: Path) -> None:
    folder, out = checkpoint("llama-meta", "hf"), tmp_path / "out"
    words = ["convert", "--ckpt_dir", str(folder), "--out_dir", str(out), "--format", "meta", "--model_parallel_size"]
    assert __main__.main([*words, "2"]) == 0
    assert {"consolidated.00.pth", "consolidated.01.pth", "params.json", "tokenizer.json"} <= {
        path.name for path in out.iterdir()
    }
    assert (out / "tokenizer.json").read_bytes() == (folder / "tokenizer.json").read_bytes()
    assert __main__.main([*words, "2"]) == 2


def test_generate_writes_results_and_nothing_else_to_stdout(checkpoint: Saver) -> None:
    folder = str(checkpoint("llama-gqa", "hf"))
    common = ["generate", "--ckpt_dir", folder, "--device", "cpu", "--temperature", "0", "--max_gen_len", "5"]
    lines = '{"prompt": "the in"}\n\n{"prompt": "a \\u2028b", "more": 1}\n'
    done = start(*common, "--prompts_file", "-", "--json", "--logprobs", "--echo", stdin=lines)
    assert done.returncode == 0, done.stderr
    records = [json.loads(line) for line in done.stdout.split("\n")[:-1]]
    assert [r["prompt"] for r in records] == ["the in", "a \u2028b"]
    for record in records:
        assert record["text"].startswith(record["prompt"])
        assert len(record["token_ids"]) == len(record["logprobs"])
        assert record["finish_reason"] in ("stop", "length")
    assert re.search(r"^2 prompts, \d+ prompt tokens, \d+ new tokens in .* tokens/s\)$", done.stderr, re.MULTILINE)

    plain = start(*common, "--echo", "--prompt", "the in", "--prompt", "a \u2028b")
    assert plain.stdout == "\n\n".join(r["text"] for r in records) + "\n"
    assert "> the in\n" in plain.stderr


def test_a_bad_prompt_is_named_by_number(checkpoint: Saver) -> None:
    folder = str(checkpoint("llama-gqa", "hf"))
    words = ["generate", "--ckpt_dir", folder, "--device", "cpu", "--max_seq_len", "16"]
    done = start(*words, "--prompt", "fine", "--prompt", "much too long " * 9)
    assert (done.returncode, done.stdout) == (2, "")
    assert "prompt 2 of 2: the prompt has" in done.stderr and "max_seq_len 16" in done.stderr


def readme_lines() -> list[str]:
    """The README's commands that start a command of ours, also those that no test runs."""
    text = (Path(__file__).parent.parent / "README.md").read_text()
    lines = "\n".join(re.findall(r"^```(?:sh)?\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)).splitlines()
    return [line for line in lines if re.search(r"^(llama_dist|.* -m llama_dist) \w", line) and "..." not in line]


@pytest.mark.parametrize("line", readme_lines())
def test_the_readme_s_commands_are_understood(line: str) -> None:
    words = shlex.split(re.split(r"(?:^|-m )llama_dist ", line, maxsplit=1)[1].partition(" |")[0], comments=True)
    assert cli.parse(words).command == words[0]
