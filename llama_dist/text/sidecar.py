"""What the small JSON files beside a Hugging Face tokenizer say about it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llama_dist.errors import CheckpointError

MAX_BYTES = 128 << 20


@dataclass(frozen=True)
class Sidecar:
    """Control tokens by text and by id, `add_bos` and the chat template; None or empty where no file says so."""

    bos: str | None = None
    eos: str | None = None
    pad: str | None = None
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()
    add_bos: bool | None = None
    chat_template: str | None = None


def read_sidecar(directory: Path) -> Sidecar:
    """Reads tokenizer_config.json, special_tokens_map.json, chat_template.jinja, generation_config.json, config.json.

    Any of them may be absent. The first three name tokens by text; the ids in the last two add to them. A template
    in its own file goes before one in tokenizer_config.json. CheckpointError for a file that is no JSON object.
    """
    config = read_object(directory / "tokenizer_config.json")
    special = read_object(directory / "special_tokens_map.json")
    generation = read_object(directory / "generation_config.json")
    model = read_object(directory / "config.json")
    add_bos = config.get("add_bos_token")
    return Sidecar(
        bos=_text(config.get("bos_token")) or _text(special.get("bos_token")),
        eos=_text(config.get("eos_token")) or _text(special.get("eos_token")),
        pad=_text(config.get("pad_token")) or _text(special.get("pad_token")),
        bos_id=next(iter(_ids(generation.get("bos_token_id")) + _ids(model.get("bos_token_id"))), None),
        eos_ids=_ids(generation.get("eos_token_id")) + _ids(model.get("eos_token_id")),
        add_bos=add_bos if isinstance(add_bos, bool) else None,
        chat_template=_template(directory, config),
    )


def read_bytes(path: Path) -> bytes:
    """The whole of a small file. CheckpointError if it cannot be read or is larger than any tokenizer."""
    try:
        if path.stat().st_size > MAX_BYTES:
            raise CheckpointError(f"{path} is larger than {MAX_BYTES >> 20} MiB: not a tokenizer file")
        return path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}; check --tokenizer_path") from None


def parse_object(data: bytes, where: str) -> dict[str, Any]:
    """The JSON object in `data`. CheckpointError if it is none."""
    try:
        parsed = json.loads(data.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{where} is not valid JSON: {str(error)[:100]}; fetch the file again") from None
    if not isinstance(parsed, dict):
        raise CheckpointError(f"{where} holds a JSON {type(parsed).__name__}, must be an object")
    return parsed


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file, empty where there is no such file."""
    return parse_object(read_bytes(path), str(path)) if path.is_file() else {}


def _text(token: Any) -> str | None:
    # Either the text itself or an object with the token's flags.
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None


def _ids(value: Any) -> tuple[int, ...]:
    values = value if isinstance(value, list) else [value]
    return tuple(v for v in values if isinstance(v, int) and not isinstance(v, bool))


def _template(directory: Path, config: dict[str, Any]) -> str | None:
    own = directory / "chat_template.jinja"
    if own.is_file():
        return read_bytes(own).decode("utf-8", "replace")
    template = config.get("chat_template")
    if isinstance(template, list):
        # Several by name: Hugging Face uses the one called default.
        named = {t.get("name"): t.get("template") for t in template if isinstance(t, dict)}
        template = named.get("default")
    return template if isinstance(template, str) else None
