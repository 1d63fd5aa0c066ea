"""The command line: parse and check everything first, run after. No torch until a line has been understood."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import fire
from fire.decorators import SetParseFns

from llama_dist.errors import ConfigError
from llama_dist.flags import build, closest, converter, flags_of, help_text, read_words
from llama_dist.frontend import options

COMMANDS: Mapping[str, type] = {
    "generate": options.GenerateOptions,
    "chat": options.ChatOptions,
    "batch": options.BatchOptions,
    "verify": options.VerifyOptions,
    "bench": options.BenchOptions,
    "inspect": options.InspectOptions,
    "plan": options.PlanOptions,
    "convert": options.ConvertOptions,
    "doctor": options.DoctorOptions,
}
"""Each command has a module of its name in `frontend`, whose `prepare(options)` checks all and returns the work."""

ON_RANKS = frozenset({"generate", "chat", "batch", "verify", "bench", "doctor"})
"""The commands that several ranks run together; the others are one process."""

LOADING = frozenset({"generate", "chat", "batch", "bench"})
"""Those that load the model that their own flags name."""

HELP_WORDS = ("--help", "-h", "help")


@dataclass(frozen=True)
class Line:
    """An understood command line: the command with its options, or the help that was asked for."""

    command: str
    options: Any = None
    help: str | None = None


def program_help() -> str:
    """The commands, a line each."""
    lines = ["usage: python -m llama_dist COMMAND [--flag value ...]", "", "commands:"]
    for name, cls in COMMANDS.items():
        lines.append(f"  {name:<10} {(cls.__doc__ or '').partition(chr(10))[0]}")
    lines += ["", "python -m llama_dist COMMAND --help lists a command's flags."]
    lines += ["On several ranks: torchrun --nproc_per_node N -m llama_dist COMMAND ..."]
    return "\n".join(lines)


def parse(argv: Sequence[str]) -> Line:
    """A command line, read whole and checked by itself; nothing runs and no file is opened. Raises ConfigError."""
    if not argv:
        raise ConfigError(f"no command: choose {', '.join(COMMANDS)}, or see --help")
    command, words = argv[0], list(argv[1:])
    if command in HELP_WORDS and (not words or words[0] not in COMMANDS):
        return Line("help", help=program_help())
    if command in HELP_WORDS:
        command, words = words[0], ["--help"]
    if command not in COMMANDS:
        meant = closest(command, COMMANDS)
        hint = f"did you mean {meant}?" if meant else f"choose {', '.join(COMMANDS)}"
        raise ConfigError(f"no command {command!r}; {hint}")
    cls = COMMANDS[command]
    flags = flags_of(cls)
    if any(word in ("--help", "-h") for word in words):
        return Line(command, help=help_text(cls, flags, command))
    texts = read_words(words, flags, command)

    @SetParseFns(**{name: converter(flag) for name, flag in flags.items()})  # type: ignore[untyped-decorator]
    def collect(**values: Any) -> Line:
        return Line(command, build(cls, flags, values))

    line = fire.Fire(
        {command: collect},
        command=[command, *(f"--{name}={text}" for name, text in texts.items())],
        name="llama_dist",
        serialize=lambda result: None,
    )
    assert isinstance(line, Line)
    return line


def prepare(line: Line, n_ranks: int) -> Callable[[], int]:
    """Check a command against its files and the ranks that were started; what is returned does the work.

    Every refusal that needs no other rank comes from here, before any process group, weight or prompt is touched.
    """
    if n_ranks > 1 and line.command not in ON_RANKS:
        raise ConfigError(
            f"{line.command} is one process; start it as `python -m llama_dist {line.command}`, no launcher"
        )
    module = importlib.import_module(f"llama_dist.frontend.{line.command}")
    work: Callable[[], int] = module.prepare(line.options)
    return work
