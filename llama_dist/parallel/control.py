"""Small messages between ranks: JSON bytes, in shared memory or as tensors over gloo, length first. No pickle.

`share` one rank's messages to all, `agree` that all hold the same value, `collect` each rank's value everywhere,
`check` a digest of what the ranks of a replica computed. Every rank of the group must call them in the same order.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from llama_dist.errors import DesyncError, PeerLost
from llama_dist.parallel import shared
from llama_dist.parallel.world import Channel, World

FRAME = 4096  # bytes of the first broadcast: 8 of length, then the message if it fits, so most ticks need one
T = TypeVar("T")


def guarded(what: str, collective: Callable[[], T]) -> T:
    """Run a collective; a failure of it means that a peer is gone or stuck. Who, the watch finds out."""
    try:
        return collective()
    except (dist.DistError, RuntimeError) as err:
        raise PeerLost(f"{what} failed: {str(err).splitlines()[0][:300]}") from err


def _bytes(tensor: torch.Tensor) -> bytes:
    return bytes(memoryview(tensor.numpy()))  # type: ignore[arg-type]


def share(world: World, messages: list[Any] | None, channel: Channel | None = None) -> list[Any]:
    """The first rank's `messages` (JSON values) on every rank of the channel (default: the whole world)."""
    channel = channel or world.everyone
    if len(channel.ranks) == 1:
        assert messages is not None
        return messages
    speaks = channel.rank == 0
    assert not speaks or messages is not None
    mine = json.dumps(messages).encode() if speaks else b""
    memory = shared.of(channel.group)
    body = _broadcast(mine, channel) if memory is None else memory.exchange(mine, "sharing a message")[0]
    result = json.loads(body)
    assert isinstance(result, list), f"shared {type(result).__name__}, not a list"
    return result


def _broadcast(body: bytes, channel: Channel) -> bytes:
    """The first rank's `body`, over gloo."""
    frame = torch.zeros(FRAME, dtype=torch.uint8)
    if channel.rank == 0:
        head = len(body).to_bytes(8, "little") + body[: FRAME - 8]
        frame[: len(head)] = torch.frombuffer(bytearray(head), dtype=torch.uint8)
    guarded("sharing a message", lambda: dist.broadcast(frame, channel.ranks[0], group=channel.group))
    raw = _bytes(frame)
    length = int.from_bytes(raw[:8], "little")
    if length <= FRAME - 8:
        return raw[8 : 8 + length]
    rest = torch.frombuffer(bytearray(body), dtype=torch.uint8) if body else torch.empty(length, dtype=torch.uint8)
    guarded("sharing a message", lambda: dist.broadcast(rest, channel.ranks[0], group=channel.group))
    return _bytes(rest)


def collect(world: World, value: Any, channel: Channel | None = None) -> list[Any]:
    """Each rank's `value` (JSON), in rank order, on every rank of the channel."""
    channel = channel or world.everyone
    if len(channel.ranks) == 1:
        return [value]
    mine = json.dumps(value).encode()
    memory = shared.of(channel.group)
    bodies = _all_gather(mine, channel) if memory is None else memory.exchange(mine, "collecting a message")
    return [json.loads(body) for body in bodies]


def _all_gather(body: bytes, channel: Channel) -> list[bytes]:
    """Each rank's `body`, filled up with spaces to the longest, over gloo."""
    lengths = [torch.zeros(1, dtype=torch.int64) for _ in channel.ranks]
    mine = torch.tensor([len(body)])
    guarded("collecting a message", lambda: dist.all_gather(lengths, mine, group=channel.group))
    longest = max(int(x) for x in lengths)
    padded = torch.frombuffer(bytearray(body.ljust(longest)), dtype=torch.uint8)
    bodies = [torch.empty(longest, dtype=torch.uint8) for _ in channel.ranks]
    guarded("collecting a message", lambda: dist.all_gather(bodies, padded, group=channel.group))
    return [_bytes(b) for b in bodies]


def claim(world: World, name: str) -> int:
    """0, 1, 2, ...: each number goes to one caller of the whole job. A counter in the store; no other rank waits."""
    return guarded(f"claiming {name}", lambda: int(world.store.add(f"claim/{name}", 1))) - 1


def _odd_ones(values: list[Any]) -> tuple[list[int], Any, Any]:
    """Places whose value differs from the commonest (ties: from the first), that value, and the first odd one."""
    texts = [json.dumps(v, sort_keys=True) for v in values]
    usual = max(texts, key=lambda t: (texts.count(t), -texts.index(t)))
    odd = [i for i, t in enumerate(texts) if t != usual]
    return odd, values[texts.index(usual)], values[odd[0]] if odd else None


def agree(world: World, value: Any, what: str) -> None:
    """All ranks hold the same `value` (JSON), or the same DesyncError rises on all of them, naming who differs."""
    values = collect(world, value)
    odd, usual, other = _odd_ones(values)
    if not odd:
        return
    if isinstance(usual, dict) and isinstance(other, dict):
        keys = sorted(k for k in usual.keys() | other.keys() if usual.get(k) != other.get(k))
        usual, other = ({k: v.get(k) for k in keys} for v in (usual, other))
    ranks = ", ".join(str(world.everyone.ranks[i]) for i in odd)
    raise DesyncError(f"ranks disagree on {what}: rank {ranks} has {other}, the others {usual}")


def check(world: World, digest: int, what: str) -> None:
    """Compare a digest (63 bits) of what the ranks of this replica computed. DesyncError names who differs."""
    channel = world.replica_channel
    odd, _, _ = _odd_ones(collect(world, digest, channel))
    if odd:
        ranks = ", ".join(str(channel.ranks[i]) for i in odd)
        raise DesyncError(f"rank {ranks} differs from the others in {what}; check that all hosts run alike")
