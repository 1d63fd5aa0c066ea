"""`verify`: some finished results of a reproducible job are computed again and compared, byte for byte."""

from __future__ import annotations

import dataclasses
import hashlib
import heapq
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llama_dist.engine.serve import serve
from llama_dist.engine.session import Checked, check_run, open_session
from llama_dist.errors import ConfigError
from llama_dist.frontend.batch.command import make_encoder
from llama_dist.frontend.batch.desk import Desk
from llama_dist.frontend.batch.drain import Drain
from llama_dist.frontend.batch.identity import Before, changes, fingerprint, fingerprint_path, job_id, read_before
from llama_dist.frontend.batch.identity import system_fingerprint as fingerprint_of
from llama_dist.frontend.batch.prompts import Encoder
from llama_dist.frontend.batch.records import Record, records
from llama_dist.frontend.batch.results import Names
from llama_dist.frontend.batch.survey import Survey, survey
from llama_dist.frontend.inbox import next_message
from llama_dist.frontend.options import BatchOptions, VerifyOptions
from llama_dist.frontend.output import Output
from llama_dist.parallel.launch import read_launch
from llama_dist.parallel.world import World, leave, model_parallel_size
from llama_dist.text.base import Tokenizer

AHEAD = 4  # batches of requests in flight


@dataclass(frozen=True)
class Sample:
    """Finished results, by line of the input, and what they were made with."""

    records: dict[int, bytes]
    survey: Survey
    names: Names
    n_results: int


class Kept:
    """Where results that are computed again go: a list of records."""

    gone = False

    def __init__(self) -> None:
        self.data = bytearray()

    def append(self, data: bytes | bytearray) -> None:
        self.data += data

    def close(self) -> None:
        pass


def prepare(options: VerifyOptions) -> Callable[[], int]:
    """Check that the job can be computed again here, and pick the sample; the work comes back."""
    path = Path(os.path.realpath(options.output_file))
    before = read_before(path)
    if before is None:
        raise ConfigError(f"--output_file {path}: there is no {fingerprint_path(path).name} beside it, no batch job")
    if "numeric mode" not in before.fingerprint:
        raise ConfigError(f"{path} is of a job that was not reproducible: another run may differ in its last bits")
    run = dataclasses.replace(options.run, reproducible=True, **_settings(before.fingerprint))
    if model_parallel_size(run, read_launch()) < read_launch().size:
        raise ConfigError("verify runs one copy of the model; leave --model_parallel_size out")
    checked = check_run(run)
    source = options.input_file or before.start.input_file
    if source == "-":
        raise ConfigError("the job read its input from a pipe; give the same lines as --input_file")
    batch = BatchOptions(run, source, str(path))
    encoder = dataclasses.replace(make_encoder(batch, checked), now=before.start.at)
    sample = None
    if read_launch().rank == 0:
        sample = pick(options.sample, path, before, batch, checked, encoder)
    return lambda: run_again(dataclasses.replace(options, run=run), checked, encoder, sample)


def _settings(stored: dict[str, Any]) -> dict[str, Any]:
    """The job's own flags, which decide its results."""
    names = ("seed", "max_seq_len", "dtype", "quantization", "chat_format")
    return {name: stored[f"--{name}"] for name in names}


def pick(n: int, path: Path, before: Before, batch: BatchOptions, checked: Checked, encoder: Encoder) -> Sample:
    """`n` answered lines, spread over the job by a hash of their numbers: the same ones every time."""
    found = survey(Path(os.path.realpath(batch.input_file)))
    mine = fingerprint(checked, encoder, batch, found)
    mine["--cached_tokens"] = before.fingerprint.get("--cached_tokens", False)
    changed = changes(mine, before.fingerprint, True)
    if changed:
        raise ConfigError(f"{path} cannot be computed again here, which differs in {'; '.join(changed)}")
    if mine["--cached_tokens"]:
        raise ConfigError(f"{path} counts prefix cache hits (--cached_tokens), which no other run repeats")

    n_results = 0

    def answered() -> Iterator[Record]:
        nonlocal n_results
        for record in records(path):
            if record.line and not record.failed:
                n_results += 1
                yield record

    def order(record: Record) -> bytes:
        return hashlib.blake2b(str(record.line).encode(), digest_size=8).digest()

    chosen = {record.line: record.raw for record in heapq.nsmallest(n, answered(), key=order)}
    if not chosen:
        raise ConfigError(f"{path} has no answered lines yet; there is nothing to verify")
    names = Names(job_id(mine), before.start.model, False, fingerprint_of(mine))
    return Sample(chosen, found, names, n_results)


def run_again(options: VerifyOptions, checked: Checked, encoder: Encoder, sample: Sample | None) -> int:
    """Compute the sample and compare. Every rank calls it alike; 0 where all agree, 1 where one does not."""
    session = open_session(options.run, checked)
    kept = Kept()
    if sample is not None:
        ahead = options.run.max_batch_size * AHEAD
        desk = Desk(
            sample.survey,
            _lines(sample),
            encoder,
            sample.names,
            options.run.seed,
            kept,
            ahead,
            Drain(session.world.watch.draining, None, 0.0),
            session.engine.validate,
            lambda stats, finished: None,
        )
        serve(session.world, session.engine, desk.inbox, desk.outbox)
    else:
        serve(session.world, session.engine, lambda idle: [], lambda done, stats: None)
    code = _tell(session.world, sample, kept, session.tokenizer)
    leave(session.world)
    return code


def _lines(sample: Sample) -> Iterator[tuple[int, bytes]]:
    for number in sorted(sample.records):
        yield from sample.survey.lines(number, number + 1)


def _tell(world: World, sample: Sample | None, kept: Kept, tokenizer: Tokenizer) -> int:
    """Rank 0 writes the verdict; its exit code, on every rank."""

    def poll() -> int:
        assert sample is not None
        differing = compare(sample.records, bytes(kept.data), tokenizer)
        if differing is None:
            n, fingerprint = len(sample.records), sample.names.system_fingerprint
            Output().write(f"{n} of {sample.n_results} results computed again, all agree ({fingerprint})\n")
            return 0
        Output().write(differing + "\n")
        return 1

    return int(next_message(world, poll))


def compare(stored: dict[int, bytes], again: bytes, tokenizer: Tokenizer) -> str | None:
    """Where the first line that differs does, None where none does."""
    now = {_line_of(raw): raw for raw in again.splitlines(keepends=True)}
    for number, raw in sorted(stored.items()):
        if now.get(number) != raw:
            return f"line {number}: {_difference(raw, now.get(number), tokenizer)}"
    return None


def _line_of(raw: bytes) -> int:
    return int(json.loads(raw)["id"].rpartition("_")[2])


def _difference(raw: bytes, new: bytes | None, tokenizer: Tokenizer) -> str:
    if new is None or (second := json.loads(new))["response"] is None:
        return f"was answered, and is not now{'' if new is None else ': ' + second['error']['message']}"
    first, second = json.loads(raw)["response"]["body"], second["response"]["body"]
    for index, (old, now) in enumerate(zip(first["choices"], second["choices"], strict=False)):
        ids = [_ids(choice, tokenizer) for choice in (old, now)]
        at = next((i for i, (a, b) in enumerate(zip(*ids, strict=False)) if a != b), min(map(len, ids)))
        if ids[0] != ids[1]:
            tokens = [repr(tokenizer.decode(part[at : at + 1])) if at < len(part) else "the end" for part in ids]
            return f"answer {index} differs from token {at + 1} on: {tokens[0]} is stored, {tokens[1]} comes now"
        if old != now:
            field = next(name for name in old if old[name] != now.get(name))
            return f"answer {index} has the same tokens, but another {field}"
    return f"the answers are the same, but {next(name for name in first if first[name] != second.get(name))} is not"


def _ids(choice: dict[str, Any], tokenizer: Tokenizer) -> list[int]:
    """The answer's token ids: as stored, or else its text's."""
    if "token_ids" in choice:
        return list(choice["token_ids"])
    text = choice["text"] if "text" in choice else choice["message"]["content"]
    return tokenizer.encode(text, bos=False, eos=False)
