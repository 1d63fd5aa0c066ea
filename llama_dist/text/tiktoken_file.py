"""Llama 3's tokenizer.model: one line per token, its bytes in base64 and its rank (tiktoken's format).

Regular expression, control tokens and the cutting of long runs follow Meta's `llama_models.llama3.tokenizer`.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Callable, Iterator

from llama_dist.errors import CheckpointError
from llama_dist.text.sidecar import Sidecar
from llama_dist.text.tokenizer import PieceTokenizer, stop_ids

LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_NAMED = (
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|reserved_special_token_0|>",
    "<|reserved_special_token_1|>",
    "<|finetune_right_pad_id|>",
    "<|step_id|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eom_id|>",
    "<|eot_id|>",
    "<|python_tag|>",
    "<|image|>",
)
_RESERVED = 256
_LINE = re.compile(rb"[A-Za-z0-9+/=]+ \d+\Z")
# tiktoken gives up on longer texts, and on longer runs of one class (openai/tiktoken, issue 195).
_MAX_CHARS = 400_000
_MAX_RUN = 25_000
_RUNS = re.compile(r"\s+|\S+")


def is_tiktoken(data: bytes) -> bool:
    """Whether the first line is base64 and a number."""
    return _LINE.match(data[:4096].split(b"\n", 1)[0].rstrip()) is not None


def load_tiktoken(data: bytes, where: str, sidecar: Sidecar) -> PieceTokenizer:
    """The tokenizer in the bytes of a file; `where` names it in errors. CheckpointError if the ranks have faults."""
    ranks = _read_ranks(data, where)
    names = [*_NAMED, *(f"<|reserved_special_token_{i + 2}|>" for i in range(_RESERVED - len(_NAMED)))]
    special = {name: len(ranks) + i for i, name in enumerate(names)}
    bos, eos = special["<|begin_of_text|>"], special["<|end_of_text|>"]
    return PieceTokenizer(
        kind="tiktoken",
        n_words=len(ranks) + len(special),
        bos_id=bos,
        eos_id=eos,
        pad_id=special["<|finetune_right_pad_id|>"],
        stop_ids=stop_ids(special, eos, *sidecar.eos_ids),
        special=special,
        add_bos=True if sidecar.add_bos is None else sidecar.add_bos,
        chat_template=sidecar.chat_template,
        encode_text=_encoder(ranks, where),
        pieces=[*sorted(ranks, key=ranks.__getitem__), *[b""] * len(special)],
    )


def cut(s: str) -> Iterator[str]:
    """`s` in parts of at most 400,000 characters with no run of blanks or non-blanks above 25,000 in them."""
    for start in range(0, len(s), _MAX_CHARS):
        part = s[start : start + _MAX_CHARS]
        begin = 0
        for run in _RUNS.finditer(part) if len(part) > _MAX_RUN else ():
            for end in range(run.start() + _MAX_RUN, run.end(), _MAX_RUN):
                yield part[begin:end]
                begin = end
        yield part[begin:]


def _encoder(ranks: dict[bytes, int], where: str) -> Callable[[str], list[int]]:
    import tiktoken

    try:
        model = tiktoken.Encoding(name="llama3", pat_str=LLAMA3_PATTERN, mergeable_ranks=ranks, special_tokens={})
    except ValueError as error:
        raise CheckpointError(f"{where}: tiktoken refuses the file: {error}") from None
    return lambda s: [i for part in cut(s) for i in model.encode_ordinary(part)]


def _read_ranks(data: bytes, where: str) -> dict[bytes, int]:
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(data.splitlines(), 1):
        if not line.strip():
            continue
        if not _LINE.match(line.strip()) or len(line) > 4096:
            raise CheckpointError(
                f"{where}: line {number} is not base64 and a rank: {line[:40]!r}; fetch the file again"
            )
        text, rank = line.split()
        try:
            token = base64.b64decode(text, validate=True)
        except binascii.Error:
            raise CheckpointError(
                f"{where}: line {number} is not base64: {text[:40]!r}; fetch the file again"
            ) from None
        if token in ranks:
            raise CheckpointError(f"{where}: line {number} repeats the token {token[:40]!r}; fetch the file again")
        ranks[token] = int(rank) if len(rank) < 10 else -1
    if sorted(ranks.values()) != list(range(len(ranks))):
        raise CheckpointError(f"{where}: ranks are not 0 to {len(ranks) - 1}, each once; fetch the file again")
    missing = [b for b in range(256) if bytes([b]) not in ranks]
    if missing:
        raise CheckpointError(f"{where}: no token for byte {missing[0]:#04x} and {len(missing) - 1} more; file damaged")
    return ranks
