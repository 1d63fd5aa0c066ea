"""Prompts from a file: one a line, plain text or JSON objects."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from llama_dist.errors import ConfigError


def _object(line: str) -> dict[str, Any] | None:
    try:
        value = json.loads(line) if line.lstrip().startswith("{") else None
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def parse_prompts(lines: Iterable[str], source: str) -> list[str]:
    """The prompts of a file's lines, empty ones skipped; ConfigError where there are none.

    When the first line is a JSON object, all must be, each with its text under "prompt". Anything else is plain text,
    a line a prompt.
    """
    numbered = [(n, line) for n, line in enumerate(lines, 1) if line.strip()]
    if not numbered:
        raise ConfigError(f"--prompts_file {source} holds no prompt; write one a line")
    if _object(numbered[0][1]) is None:
        return [line for _, line in numbered]
    prompts = []
    for n, line in numbered:
        prompt = (_object(line) or {}).get("prompt")
        if not isinstance(prompt, str):
            raise ConfigError(
                f'--prompts_file {source}, line {n}: must be a JSON object with a text "prompt", as line 1 is one'
            )
        prompts.append(prompt)
    return prompts


def read_prompts_file(path: str) -> list[str]:
    """The prompts of a UTF-8 file. Raises ConfigError when it cannot be read or holds none."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except OSError as err:
        raise ConfigError(f"--prompts_file {path} cannot be read: {err.strerror}") from None
    except UnicodeDecodeError as err:
        raise ConfigError(f"--prompts_file {path} is no UTF-8 text at byte {err.start}") from None
    # Only real line ends: a prompt may hold U+2028 or a form feed.
    return parse_prompts((line.removesuffix("\r") for line in text.split("\n")), path)
