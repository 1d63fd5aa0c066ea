"""Flags from dataclasses: read a command line into one of them, strictly, before anything runs; and its help.

python-fire does the dispatch, but it calls a function first and complains about a mistyped flag afterwards, takes the
last of a repeated flag, and reads `-` as its own separator. So the words are checked and brought into one form here.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import re
import textwrap
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import UnionType
from typing import Any

from llama_dist.errors import ConfigError, RequestError
from llama_dist.frontend.options import RENAMED, SHARED_HELP, SHARED_PARSE

FLAG = re.compile(r"--([A-Za-z][\w-]*)(?:=(.*))?", re.DOTALL)
WORDS: Mapping[Any, str] = {str: "TEXT", int: "INT", float: "NUMBER", tuple[str, ...]: "TEXT", tuple[int, ...]: "LIST"}


@dataclass(frozen=True)
class Flag:
    """One flag: `path` is where its value goes, e.g. ("run", "seed"); `optional`: it may be None beside `type`.

    `instead`: the flag that may be given in place of this required one, whose value it then takes too.
    """

    name: str
    path: tuple[str, ...]
    type: Any
    optional: bool
    default: Any
    help: str
    parse: Callable[[str], Any] | None = None
    instead: str | None = None

    @property
    def required(self) -> bool:
        return self.default is dataclasses.MISSING

    @property
    def repeats(self) -> bool:
        return bool(self.type == tuple[str, ...])


def _without_none(hint: Any) -> tuple[Any, bool]:
    if typing.get_origin(hint) not in (UnionType, typing.Union):
        return hint, False
    rest = [t for t in typing.get_args(hint) if t is not type(None)]
    assert len(rest) == 1, f"a flag has one type, not {hint}"
    return rest[0], True


def flags_of(options: type) -> dict[str, Flag]:
    """The flags of an options class, nested dataclasses flattened, by name in the order of the fields."""
    found: dict[str, Flag] = {}
    hints = typing.get_type_hints(options)
    for field in dataclasses.fields(options):
        if dataclasses.is_dataclass(hints[field.name]):
            inner = hints[field.name]
            inner_hints = typing.get_type_hints(inner)
            for sub in dataclasses.fields(inner):
                if not field.metadata["names"] or sub.name in field.metadata["names"]:
                    name = RENAMED.get(sub.name, sub.name)
                    kind, optional = _without_none(inner_hints[sub.name])
                    path = (field.name, sub.name)
                    parse, instead = SHARED_PARSE.get(name), field.metadata["instead"].get(name)
                    found[name] = Flag(name, path, kind, optional, sub.default, SHARED_HELP[name], parse, instead)
        else:
            kind, optional = _without_none(hints[field.name])
            found[field.name] = Flag(
                field.name,
                (field.name,),
                kind,
                optional,
                field.default,
                field.metadata["help"],
                field.metadata["parse"],
            )
    return found


def closest(word: str, known: Iterable[str]) -> str | None:
    """The known word that a mistyped one most likely meant."""
    match = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return match[0] if match else None


def _flag_and_value(word: str, flags: Mapping[str, Flag], command: str) -> tuple[Flag, str | None]:
    """The flag a word such as `--max-seq-len=5` names, and the value that is part of the word."""
    found = FLAG.fullmatch(word)
    if not found:
        raise ConfigError(f"unexpected {word!r}: write --flag value, and quote a text with spaces")
    name, value = found[1].replace("-", "_"), found[2]
    if name in flags:
        return flags[name], value
    positive = flags.get(name.removeprefix("no")) if name.startswith("no") else None
    if positive and positive.type is bool and value is None:
        return positive, "false"
    meant = closest(name, flags)
    hint = f"did you mean --{meant}?" if meant else f"see `llama_dist {command} --help`"
    raise ConfigError(f"{command} has no flag --{found[1]}; {hint}")


def read_words(words: Sequence[str], flags: Mapping[str, Flag], command: str) -> dict[str, str]:
    """Flag names to the text given for them. Repeated texts become one JSON list. Raises ConfigError.

    `--echo --prompt 1,2 --prompt -` gives {"echo": "true", "prompt": '["1,2", "-"]'}.
    """
    given: dict[str, list[str]] = {}
    rest = list(words)
    while rest:
        word = rest.pop(0)
        flag, value = _flag_and_value(word, flags, command)
        if value is None and flag.type is bool:
            value = rest.pop(0) if rest and rest[0].lower() in ("true", "false") else "true"
        elif value is None:
            if not rest or FLAG.fullmatch(rest[0]):
                dashes = f"; a text that begins with -- is given as --{flag.name}=TEXT" if rest else ""
                raise ConfigError(f"--{flag.name} has no value: write --{flag.name} {placeholder(flag)}{dashes}")
            value = rest.pop(0)
        given.setdefault(flag.name, []).append(value)
    for name, texts in given.items():
        if len(texts) > 1 and not flags[name].repeats:
            raise ConfigError(f"--{name} is given {len(texts)} times; give it once")
    for flag in flags.values():
        if flag.required and flag.name not in given and flag.instead not in given:
            other = f" or --{flag.instead} {placeholder(flags[flag.instead])}" if flag.instead else ""
            raise ConfigError(f"{command} needs --{flag.name} {placeholder(flag)}{other}: {flag.help}")
    return {name: texts[0] if len(texts) == 1 else json.dumps(texts) for name, texts in given.items()}


def _texts(text: str) -> tuple[str, ...]:
    try:
        items = json.loads(text) if text.lstrip().startswith("[") else None
    except ValueError:
        items = None
    if isinstance(items, list) and items and all(isinstance(item, str) for item in items):
        return tuple(items)
    return (text,)


def _convert(flag: Flag, text: str) -> Any:
    if flag.parse:
        return flag.parse(text)
    if flag.optional and flag.type is not str and text.lower() == "none":
        return None
    if flag.type is bool:
        if text.lower() not in ("true", "false", "1", "0"):
            raise ValueError("must be true or false")
        return text.lower() in ("true", "1")
    if flag.type is int:
        if not re.fullmatch(r"[+-]?\d{1,30}", text.strip(), re.ASCII):
            raise ValueError("must be a whole number")
        return int(text)
    if flag.type is float:
        try:
            return float(text)
        except ValueError:
            raise ValueError("must be a number") from None
    if flag.repeats:
        return _texts(text)
    if flag.name.endswith(("_dir", "_path", "_file")) and not text:
        raise ValueError("must be a path")
    return text


def converter(flag: Flag) -> Callable[[str], Any]:
    """What turns a flag's text into its value. Raises ConfigError naming the flag and what it may be."""

    def convert(text: str) -> Any:
        try:
            return _convert(flag, text)
        except ValueError as err:
            raise ConfigError(f"--{flag.name} is {text!r}, {err}") from None

    return convert


def build(options: type, flags: Mapping[str, Flag], values: Mapping[str, Any]) -> Any:
    """An instance of the options class from values by flag name; what is not given keeps its default."""
    nested: dict[str, dict[str, Any]] = {}
    own: dict[str, Any] = {}
    given = dict(values)
    for name, flag in flags.items():
        if name not in given and flag.instead in given:
            given[name] = given[flag.instead]
    for name, value in given.items():
        path = flags[name].path
        if len(path) == 2:
            nested.setdefault(path[0], {})[path[1]] = value
        else:
            own[name] = value
    hints = typing.get_type_hints(options)
    try:
        for field in dataclasses.fields(options):
            if dataclasses.is_dataclass(hints[field.name]):
                own[field.name] = hints[field.name](**nested.get(field.name, {}))
    except RequestError as err:  # names the field; a user of the command line knows the flag
        name = err.field or ""
        raise ConfigError(str(err).replace(name, f"--{RENAMED.get(name, name)}", 1)) from None
    return options(**own)


def placeholder(flag: Flag) -> str:
    """The word that stands for a flag's value in help and messages."""
    if flag.name.endswith("_dir"):
        return "DIR"
    if flag.name.endswith(("_path", "_file")):
        return "FILE"
    if flag.name.endswith("_memory") and flag.type is int:
        return "SIZE"
    return WORDS[flag.type]


def help_text(options: type, flags: Mapping[str, Flag], command: str) -> str:
    """A command's help: what it does, then a line or two for each flag with its type and default."""
    summary, _, rest = (options.__doc__ or "").partition("\n")
    required = [f for f in flags.values() if f.required]
    needed = " ".join(
        f"--{f.name} {placeholder(f)}" + (f" | --{f.instead} {placeholder(flags[f.instead])}" if f.instead else "")
        for f in required
    )
    usage = f"usage: python -m llama_dist {command} {needed} [--flag value ...]".replace("  ", " ")
    lines = [textwrap.fill(usage, 100, subsequent_indent="    "), "", f"{command}: {summary.strip()}."]
    lines += ["", textwrap.fill(" ".join(rest.split()), 100), "", "flags:"]
    for flag in flags.values():
        shown = f"--{flag.name}" if flag.type is bool else f"--{flag.name} {placeholder(flag)}"
        if flag.required:
            note = f"required, or --{flag.instead}" if flag.instead else "required"
        elif flag.default is None or flag.default == ():
            note = ""
        else:
            shown_default = ",".join(map(str, flag.default)) if isinstance(flag.default, tuple) else str(flag.default)
            note = f"default: {shown_default.lower() if flag.type is bool else shown_default}"
        text = flag.help + (f" [{note}]" if note else "")
        lines += textwrap.wrap(text, 100, initial_indent=f"  {shown:<28} ", subsequent_indent=" " * 31)
    lines += [
        "",
        "--flag value and --flag=value are the same, and - may stand for _ in a name. --noFLAG or --FLAG=false",
    ]
    lines += ["turns a yes-or-no flag off."]
    return "\n".join(lines)
