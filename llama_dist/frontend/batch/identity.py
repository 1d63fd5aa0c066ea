"""A job's fingerprint: what its results depend on. A resume with another one would mix two jobs in one file."""

from __future__ import annotations

import datetime
import hashlib
import json
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from llama_dist import __version__
from llama_dist.checkpoint.reader import Reader
from llama_dist.engine.session import Checked, mode_of
from llama_dist.errors import ConfigError
from llama_dist.frontend.batch.outfile import replace_with
from llama_dist.frontend.batch.prompts import Encoder
from llama_dist.frontend.batch.survey import Survey
from llama_dist.frontend.options import BatchOptions
from llama_dist.text.tokenizer import PieceTokenizer

log = logging.getLogger("llama_dist")

Fingerprint = dict[str, Any]
"""Names of what results depend on, and what each is in this job; JSON values."""


@dataclass(frozen=True)
class Beginning:
    """What the first run of a job fixes for all of them: the model's name where a request gives none, and its time.

    `input_file`: where it read the requests, for a person and for `verify`; "-" is a pipe.
    """

    model: str
    at: datetime.datetime
    input_file: str


@dataclass(frozen=True)
class Before:
    """What an earlier run left."""

    fingerprint: Fingerprint
    start: Beginning


def checkpoint_digest(reader: Reader) -> str:
    """The model's config, every tensor's shape and dtype, and the values of one row of each, as 32 hex digits.

    Neither a file's name nor its time plays a part: a checkpoint may be moved between two runs of a job.
    """
    digest = hashlib.blake2b(repr(reader.config).encode(), digest_size=16)
    for name, info in sorted(reader.tensors.items()):
        digest.update(f"{name} {info.shape} {info.dtype}".encode())
        row = info.shape[0] // 2
        for piece in reader.read(name, 0, row, row + 1):
            digest.update(piece.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def tokenizer_digest(encoder: Encoder) -> str:
    """The vocabulary, the control tokens and the chat template, as 32 hex digits."""
    tokenizer = encoder.tokenizer
    assert isinstance(tokenizer, PieceTokenizer), "every tokenizer of load_tokenizer and tokenizer_from_gguf is one"
    digest = hashlib.blake2b(b"\0".join(tokenizer.pieces), digest_size=16)
    special = sorted(tokenizer.special.items())
    stop = sorted(tokenizer.stop_ids)
    digest.update(repr((special, stop, tokenizer.add_bos, tokenizer.chat_template)).encode("utf-8", "surrogatepass"))
    digest.update(repr(tokenizer.encode("Déjà  vu,\n1234 it's\t中文 🙂", bos=True, eos=True)).encode())
    return digest.hexdigest()


def fingerprint(checked: Checked, encoder: Encoder, options: BatchOptions, found: Survey) -> Fingerprint:
    mode = mode_of(options.run, checked)
    promised = {} if mode is None else {"numeric mode": mode}
    return {
        **promised,
        "input": {"blake2b": found.digest, "bytes": found.n_bytes, "lines": found.n_lines},
        "checkpoint": checkpoint_digest(checked.reader),
        "tokenizer": tokenizer_digest(encoder),
        "--seed": options.run.seed,
        "--max_seq_len": encoder.max_seq_len,
        "--dtype": str(checked.dtype).removeprefix("torch."),
        "--quantization": options.run.quantization,
        "--chat_format": encoder.chat_format,
        "--cached_tokens": options.cached_tokens,
        "version of llama_dist": __version__,
        "version of torch": torch.__version__,
    }


def job_id(mine: Fingerprint) -> str:
    """16 hex digits of what was asked; versions and processors play no part."""
    asked = {name: value for name, value in mine.items() if not name.startswith(("version", "numeric"))}
    return hashlib.blake2b(json.dumps(asked, sort_keys=True).encode(), digest_size=8).hexdigest()


def system_fingerprint(mine: Fingerprint) -> str | None:
    """OpenAI's field, for reproducible jobs: a digest of all that a result's bits depend on, but the request."""
    if "numeric mode" not in mine:
        return None
    rest = {name: value for name, value in mine.items() if name not in ("input", "--cached_tokens")}
    return "fp_" + hashlib.blake2b(json.dumps(rest, sort_keys=True).encode(), digest_size=8).hexdigest()


NO_PROMISE = {"numeric mode": "none, as not reproducible"}


def changes(mine: Fingerprint, before: Mapping[str, Any], reproducible: bool | None) -> list[str]:
    """What differs from an earlier run, a phrase each.

    `reproducible` None: nobody asked for the same bits, so another numeric mode is told and does not count.
    """
    found = []
    before = {**NO_PROMISE, **before}
    for name, value in {**NO_PROMISE, **mine}.items():
        old = before.get(name)
        if old == value:
            continue
        if name == "numeric mode" and reproducible is None:
            log.warning("this run's numbers may differ in their last bits from those before: %s, was %s", value, old)
            continue
        if isinstance(value, dict):
            counts = f"{value['lines']} lines, {value['bytes']} bytes"
            earlier = f"{old.get('lines')} lines, {old.get('bytes')} bytes" if isinstance(old, dict) else "unknown"
            same = "the same size but another content" if counts == earlier else f"{counts}, was {earlier}"
            found.append(f"the input ({same})")
        elif name in ("checkpoint", "tokenizer"):
            found.append(f"the {name}")
        else:
            found.append(f"{name} ({value}, was {old})")
    return found


def fingerprint_path(output: Path) -> Path:
    return output.with_name(output.name + ".job.json")


def read_before(output: Path) -> Before | None:
    """What the run before was, None where there is none. ConfigError for a damaged file."""
    return read_identity(fingerprint_path(output))


def read_identity(path: Path) -> Before | None:
    """What a file says the run before was, None where there is none. ConfigError for a damaged file."""
    try:
        data = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as err:
        raise ConfigError(
            f"{path} cannot be read ({' '.join(str(err).split())[:100]}); remove it and give --force"
        ) from None
    try:
        at = datetime.datetime.fromisoformat(data["began"])
        fingerprint, model, input_file = data["fingerprint"], data["model"], data["input_file"]
        if not (isinstance(fingerprint, dict) and isinstance(model, str) and isinstance(input_file, str)):
            raise TypeError
    except (TypeError, ValueError, LookupError):
        raise ConfigError(f"{path} is no file of a batch job; remove it and give --force") from None
    return Before(fingerprint, Beginning(model, at, input_file))


def fingerprint_text(mine: Fingerprint, start: Beginning) -> bytes:
    began = start.at.isoformat(timespec="seconds")
    about = {"job": job_id(mine), "model": start.model, "began": began, "input_file": start.input_file}
    return json.dumps({**about, "fingerprint": mine}, indent=2).encode() + b"\n"


def write_fingerprint(output: Path, mine: Fingerprint, start: Beginning) -> None:
    replace_with(fingerprint_path(output), [fingerprint_text(mine, start)])


def model_name(ckpt_dir: str) -> str:
    """What results call the model where a request does not say."""
    return os.path.basename(os.path.realpath(ckpt_dir)).removesuffix(".gguf")
