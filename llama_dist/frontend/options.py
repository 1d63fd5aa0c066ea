"""What each command may be told: frozen dataclasses, one a command. No torch, so that a mistyped flag answers at once.

A field that is itself a dataclass (RunConfig, SamplingParams) contributes its own fields as flags, with their types and
defaults; `part` picks which. `option` describes a flag that only one command has.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from llama_dist.config import RunConfig
from llama_dist.errors import ConfigError
from llama_dist.model.shapes import SHAPES
from llama_dist.request import SamplingParams

SHARED_HELP: Mapping[str, str] = {
    "ckpt_dir": "checkpoint: a folder (Meta .pth or safetensors) or a .gguf file",
    "tokenizer_path": "tokenizer file; default: what lies in the checkpoint directory",
    "max_seq_len": "longest sequence in tokens, prompt and answer; default: the model's own, at most 4096",
    "max_batch_size": "sequences computed at once",
    "max_batch_tokens": "tokens of one tick, prompts and answers; default: 2048, CPU 512, or the batch size if more",
    "kv_cache_memory": "memory of a rank's cache of keys and values, such as 4GB; default: what is left",
    "prefix_caching": "compute beginnings that several prompts share only once",
    "model_parallel_size": "ranks that share one copy of the model; default: all; fewer make replicas",
    "units": "pieces every parallel dimension is cut into; default: 8, or the ranks where more",
    "seed": "seed of the sampler; the same seed gives the same text on any number of ranks",
    "dtype": "type of weights and activations: auto, float32, bfloat16 or float16",
    "quantization": "pack the weights while loading: int8, int4 or fp8; less memory, and faster answers on a CPU",
    "device": "auto, cpu or cuda",
    "chat_format": "chat format in place of the one found: see `inspect`",
    "timeout": "seconds a rank waits for the others before it gives up",
    "check_every": "ticks between two comparisons of what the ranks sampled",
    "reproducible": "the same bits on any number of ranks, in any batch and after any stop; default: where cheap",
    "verbose": "logs of every rank, and more of them",
    "temperature": "0 is greedy; higher is more varied",
    "top_p": "mass of the nucleus to sample from, 0 to 1",
    "max_gen_len": "longest answer in tokens; default: up to --max_seq_len",
    "logprobs": "log probability of every token (with --json)",
    "echo": "answers begin with their prompt",
}
"""One line of help for each flag that comes from RunConfig or SamplingParams, by the flag's name."""

RENAMED: Mapping[str, str] = {"max_tokens": "max_gen_len"}
"""Fields whose flag keeps the name that users of Meta's scripts know."""


def option(help: str, parse: Callable[[str], Any] | None = None) -> dict[str, Any]:
    """Metadata of a command's own flag. `parse` turns its text into the value (ValueError: "must be …")."""
    return {"help": help, "parse": parse}


def part(*names: str, instead: Mapping[str, str] | None = None) -> dict[str, Any]:
    """Metadata of a nested dataclass: the fields of it that become flags; none named: all.

    `instead`: of a required field, the command's own flag that may be given in its place.
    """
    return {"names": names, "instead": instead or {}}


def parse_counts(text: str) -> tuple[int, ...]:
    """`1,2,4` to (1, 2, 4)."""
    if not re.fullmatch(r"\s*\d+\s*(,\s*\d+\s*)*", text) or 0 in (counts := [int(n) for n in text.split(",")]):
        raise ValueError("must be a whole number from 1, or several with commas such as 1,2,4")
    return tuple(counts)


SIZE_UNITS: Mapping[str, int] = {
    "B": 1,
    **{f"{letter}B": 1000**i for i, letter in enumerate("KMGT", 1)},
    **{f"{letter}iB": 1024**i for i, letter in enumerate("KMGT", 1)},
}


def parse_sizes(text: str) -> tuple[int, ...]:
    """`80GB` or `79.6GiB,79.6GiB` to bytes: GB is 10^9, GiB is 2^30."""
    units = {name.lower(): factor for name, factor in SIZE_UNITS.items()}
    sizes = []
    for item in text.split(","):
        found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]+)\s*", item)
        if not found or found[2].lower() not in units:
            raise ValueError(f"must be a size with its unit ({', '.join(SIZE_UNITS)}), such as 80GB or 79.6GiB")
        size = float(found[1]) * units[found[2].lower()]
        if not (math.isfinite(size) and size >= 1):
            raise ValueError("must be at least one byte")
        sizes.append(int(size))
    return tuple(sizes)


def parse_size(text: str) -> int:
    """One size to bytes."""
    sizes = parse_sizes(text)
    if len(sizes) != 1:
        raise ValueError("must be one size")
    return sizes[0]


SHARED_PARSE: Mapping[str, Callable[[str], Any]] = {"kv_cache_memory": parse_size}
"""How a shared flag's text becomes its value, where its type does not say."""


@dataclass(frozen=True)
class GenerateOptions:
    """completes prompts

    The text of the answers goes to stdout. Several answers have an empty line between them, and each prompt goes to
    stderr, after "> ", before its answer; a program that reads several answers wants --json. The last line of stderr
    counts tokens and seconds.
    """

    run: RunConfig = field(metadata=part())
    sampling: SamplingParams = field(metadata=part("temperature", "top_p", "max_tokens", "logprobs", "echo"))
    prompt: tuple[str, ...] = field(
        default=(), metadata=option("a prompt; several: repeat the flag, or give a JSON list of strings")
    )
    prompts_file: str | None = field(
        default=None,
        metadata=option('a file of prompts, one a line: plain text, or JSON objects with "prompt"; - is stdin'),
    )
    chat: bool = field(
        default=False, metadata=option("put each prompt to the model as a user's message, in its chat format")
    )
    json: bool = field(
        default=False, metadata=option("one JSON object a line: prompt, text, token_ids, logprobs, finish_reason")
    )

    def __post_init__(self) -> None:
        if self.prompt and self.prompts_file is not None:
            raise ConfigError("--prompt and --prompts_file exclude each other; give one of them")
        if not self.prompt and self.prompts_file is None:
            raise ConfigError("no prompt: give --prompt TEXT or --prompts_file FILE")
        if self.sampling.logprobs and not self.json:
            raise ConfigError("--logprobs has no place in plain text; add --json")


@dataclass(frozen=True)
class ChatOptions:
    """a conversation on the terminal

    Reads a message a line from stdin and streams the answers to stdout; prompt marks and notes go to stderr. Lines
    that begin with / are commands: /help lists them. The oldest turns are dropped when the history grows too long.
    """

    run: RunConfig = field(metadata=part())
    sampling: SamplingParams = field(metadata=part("temperature", "top_p", "max_tokens"))
    system: str | None = field(default=None, metadata=option("system prompt"))


@dataclass(frozen=True)
class BatchOptions:
    """answers a file of requests, every line exactly once

    Reads OpenAI's batch lines, or bare {"prompt": ...} and {"messages": ...}, and appends a result a line as it
    finishes. Killed at any moment, the same command goes on where it was. It ends with 0 when every line has its
    result (an error record is one), with 75 when it was told to stop before: run it again. OUTPUT.status.json says
    how it fares.
    """

    run: RunConfig = field(metadata=part())
    input_file: str = field(metadata=option("JSON lines, one request each; - is stdin"))
    output_file: str = field(metadata=option("results, one JSON line each; - is stdout, which cannot be resumed"))
    ordered: bool = field(default=False, metadata=option("put the finished file in the order of the input"))
    strict: bool = field(default=False, metadata=option("check every line first, and refuse a file that has a bad one"))
    retry_failed: bool = field(default=False, metadata=option("answer lines again that have an error in the output"))
    force: bool = field(
        default=False, metadata=option("go on though input, checkpoint, flags or versions have changed")
    )
    cached_tokens: bool = field(
        default=False,
        metadata=option("count prefix cache hits in the usage of each result; they depend on what ran before"),
    )
    grace: float = field(
        default=30.0, metadata=option("seconds that running requests have to finish, once told to stop")
    )
    deadline: float | None = field(
        default=None,
        metadata=option("seconds after which no more lines are begun; default: in time for the end Slurm has set"),
    )
    shared_output: bool = field(
        default=False,
        metadata=option(
            "other tasks, started with the same command, work on the same files: share the lines with them"
        ),
    )
    lease_timeout: float = field(
        default=60.0,
        metadata=option("seconds without a sign of life after which a task's lines go to others (--shared_output)"),
    )
    log_every: float = field(default=10.0, metadata=option("seconds between two lines of progress in a log; 0 is none"))
    report: str | None = field(default=None, metadata=option("an HTML page with plots of the run, written at its end"))

    def __post_init__(self) -> None:
        for name in ("grace", "deadline", "log_every"):
            value = getattr(self, name)
            if value is not None and not (value >= 0 and math.isfinite(value)):
                raise ConfigError(f"--{name} is {value}, must be 0 seconds or more")
        for name in ("input_file", "output_file"):
            if not getattr(self, name):
                raise ConfigError(f"--{name} is empty, must be a path or -")
        if self.output_file == "-" and (self.ordered or self.retry_failed or self.force):
            raise ConfigError("--ordered, --retry_failed and --force need an --output_file that is a file, not -")
        if self.shared_output and "-" in (self.input_file, self.output_file):
            raise ConfigError("--shared_output needs files that every task can open, not -")
        if not (1 <= self.lease_timeout < math.inf):
            raise ConfigError(f"--lease_timeout is {self.lease_timeout}, must be 1 second or more")


@dataclass(frozen=True)
class VerifyOptions:
    """computes finished results of a reproducible batch job again

    Takes the job's own settings from the file beside its output, on any number of ranks, and says that all of the
    sample agree, byte for byte, or where the first one that does not departs. Exit code 1 where one does not.
    """

    run: RunConfig = field(
        metadata=part(
            "ckpt_dir",
            "tokenizer_path",
            "max_batch_size",
            "max_batch_tokens",
            "kv_cache_memory",
            "prefix_caching",
            "units",
            "device",
            "timeout",
            "verbose",
        )
    )
    output_file: str = field(metadata=option("the results of `batch --reproducible`"))
    input_file: str | None = field(default=None, metadata=option("the requests; default: where the job read them"))
    sample: int = field(default=20, metadata=option("results to compute again, spread over the file"))

    def __post_init__(self) -> None:
        if self.sample < 1:
            raise ConfigError(f"--sample is {self.sample}, must be 1 or more")


BENCH_WORK = ("decode", "sampled", "prefill", "batch")
BENCH_ALL = (*BENCH_WORK, "reproducible")


def parse_words(known: Sequence[str]) -> Callable[[str], tuple[str, ...]]:
    """A parser of `decode,batch`: some of the known words, in the order known."""

    def parse(text: str) -> tuple[str, ...]:
        words = [word.strip() for word in text.split(",")]
        if any(word not in known for word in words):
            raise ValueError(f"must be some of {','.join(known)}")
        return tuple(word for word in known if word in words)

    return parse


CONTENDERS = ("transformers", "llama.cpp", "vllm")


def parse_contenders(text: str) -> tuple[str, ...]:
    """`transformers,vllm=/venv/bin/python` to its items, each contender once."""
    items = [item.strip() for item in text.split(",")]
    names = [item.partition("=")[0] for item in items]
    if any(name not in CONTENDERS for name in names) or len(set(names)) < len(names):
        raise ValueError(f"must be some of {','.join(CONTENDERS)}, each alone or as NAME=PYTHON")
    return tuple(items)


@dataclass(frozen=True)
class BenchOptions:
    """measures this machine's speed at a model, beside the limits of the hardware

    Decoding, prefill and a mixed batch in interleaved rounds, start-up, memory and where the time of a step goes. The
    table goes to stdout. Sequences are as long as the work needs; what the model or the memory has no room for is left
    out, and named.
    """

    run: RunConfig = field(
        metadata=part(
            "ckpt_dir",
            "tokenizer_path",
            "max_seq_len",
            "max_batch_tokens",
            "kv_cache_memory",
            "units",
            "seed",
            "dtype",
            "quantization",
            "device",
            "timeout",
            "check_every",
            "reproducible",
            "verbose",
            instead={"ckpt_dir": "shape"},
        )
    )
    shape: str | None = field(
        default=None,
        metadata=option(f"random weights of a published model's shape, in place of --ckpt_dir: {', '.join(SHAPES)}"),
    )
    work: tuple[str, ...] = field(
        default=BENCH_WORK,
        metadata=option(
            f"what to measure, of {','.join(BENCH_ALL)}; the last is what reproducible sums cost",
            parse=parse_words(BENCH_ALL),
        ),
    )
    repeats: int = field(default=3, metadata=option("rounds; the table has medians over them"))
    json: str | None = field(default=None, metadata=option("a file for all figures, as JSON"))
    plot: str | None = field(default=None, metadata=option("a PNG file for a picture of them"))
    against: tuple[str, ...] = field(
        default=(),
        metadata=option(
            f"others to do the same work in turn, fresh processes all: {','.join(CONTENDERS)}, each alone or as "
            "NAME=PYTHON of a virtual environment that has it",
            parse=parse_contenders,
        ),
    )
    scale: bool = field(
        default=False,
        metadata=option("how cost grows with batch, context, ranks and lines of a file too; takes many minutes"),
    )

    def __post_init__(self) -> None:
        if self.shape is not None and self.run.ckpt_dir != self.shape:
            raise ConfigError("--ckpt_dir and --shape exclude each other; give one of them")
        if self.shape is not None and self.shape not in SHAPES:
            raise ConfigError(f"--shape is {self.shape!r}, must be one of {', '.join(SHAPES)}")
        if self.repeats < 1:
            raise ConfigError(f"--repeats is {self.repeats}, must be 1 or more")
        if self.against and self.scale:
            raise ConfigError("--against and --scale exclude each other; make two runs of it")


@dataclass(frozen=True)
class InspectOptions:
    """says what a checkpoint is

    Reads headers only, no weights. Results go to stdout.
    """

    run: RunConfig = field(metadata=part("ckpt_dir", "tokenizer_path", "chat_format"))
    json: bool = field(default=False, metadata=option("one JSON object"))


@dataclass(frozen=True)
class PlanOptions:
    """counts what a model needs of so many GPUs

    Needs no GPU and reads no weights. Sizes: GB is 10^9 bytes, GiB is 2^30. Exit code 2 when nothing fits.
    """

    run: RunConfig = field(metadata=part("ckpt_dir", "max_seq_len", "max_batch_size", "dtype", "quantization", "units"))
    gpus: tuple[int, ...] = field(
        metadata=option("GPUs that share the model: 8, or several to compare: 1,2,4,8", parse=parse_counts)
    )
    gpu_memory: tuple[int, ...] = field(
        metadata=option(
            "memory of a GPU: 80GB; or of each one: 80GB,80GB,40GB (the smallest decides)", parse=parse_sizes
        )
    )
    json: bool = field(default=False, metadata=option("one JSON object a line, one for each number of GPUs"))

    def __post_init__(self) -> None:
        if len(self.gpu_memory) > 1 and any(len(self.gpu_memory) != n for n in self.gpus):
            raise ConfigError(
                f"--gpu_memory lists {len(self.gpu_memory)} sizes for --gpus {','.join(map(str, self.gpus))}; "
                "give one size, or one for each GPU"
            )


@dataclass(frozen=True)
class DoctorOptions:
    """finds what is wrong with ranks, hosts, network and files

    Start it as the job will be started, on the same ranks. It names ranks that are missing, stopped, slow or different,
    pairs that cannot connect or are slow, and folders that are not shared, in less than a minute. Exit code 1 where
    something is wrong.
    """

    ckpt_dir: str | None = field(default=None, metadata=option(f"{SHARED_HELP['ckpt_dir']}; looked at on every rank"))
    output_file: str | None = field(
        default=None, metadata=option("where a job would write: one small file is put beside it and taken away again")
    )
    model_parallel_size: int | None = field(
        default=RunConfig.model_parallel_size, metadata=option(SHARED_HELP["model_parallel_size"])
    )
    device: str = field(default=RunConfig.device, metadata=option(SHARED_HELP["device"]))
    timeout: float = field(default=20.0, metadata=option("seconds to wait for ranks to start"))
    json: bool = field(default=False, metadata=option("one JSON object"))
    verbose: bool = field(default=RunConfig.verbose, metadata=option(SHARED_HELP["verbose"]))

    def __post_init__(self) -> None:
        if not 0 < self.timeout < math.inf:
            raise ConfigError(f"--timeout is {self.timeout}, must be more than 0 seconds")
        if self.output_file in ("", "-"):
            raise ConfigError(f"--output_file is {self.output_file!r}, must be a path")
        assert self.run  # checks the rest

    @property
    def run(self) -> RunConfig:
        return RunConfig(
            self.ckpt_dir or "",
            model_parallel_size=self.model_parallel_size,
            device=self.device,
            verbose=self.verbose,
        )


ConvertFormat = Literal["hf", "meta"]


@dataclass(frozen=True)
class ConvertOptions:
    """writes a checkpoint in another format

    Streams: memory stays near one tensor. One process is enough; do not start it under torchrun.
    """

    run: RunConfig = field(metadata=part("ckpt_dir", "tokenizer_path", "dtype", "model_parallel_size"))
    out_dir: str = field(metadata=option("folder to write; it must be empty or not there yet"))
    format: str = field(default="hf", metadata=option(f"format to write: {' or '.join(get_args(ConvertFormat))}"))

    def __post_init__(self) -> None:
        if self.format not in get_args(ConvertFormat):
            raise ConfigError(f"--format is {self.format!r}, must be one of {', '.join(get_args(ConvertFormat))}")
        if self.format == "hf" and self.run.model_parallel_size is not None:
            raise ConfigError("--model_parallel_size is for --format meta; safetensors are not cut by rank")
