"""Who can connect to whom, and how far the hosts' clocks are apart. Plain sockets, so that each pair has its name."""

from __future__ import annotations

import errno
import os
import select
import socket
import struct
import threading
import time
from collections.abc import Callable, Mapping, Sequence

from llama_dist.parallel.launch import Launch
from llama_dist.parallel.network import addresses_of, interface_between

Address = tuple[str, int]
BACKLOG = 4096
AT_ONCE = 128  # connections a rank opens side by side, of the files that a process may have open
ROUND_TRIPS = 10
PING = struct.Struct("!q")
LOOK_AGAIN = 0.2  # seconds
QUIET = 1.0  # seconds after which a connection that says nothing is closed


def own_address(launch: Launch, towards: Sequence[str | None]) -> str:
    """Where the others reach this rank: what gloo listens on. `towards`: each rank's own address on the way to the
    store, None where it is not known. OSError: there is none.
    """
    chosen = os.environ.get("GLOO_SOCKET_IFNAME")
    mine = towards[launch.rank] or "127.0.0.1"
    if chosen is None:
        chosen = interface_between(mine, [address for address in towards if address], launch.port)
    if chosen is None:
        return mine
    found = addresses_of(chosen)
    if not found:
        raise OSError(errno.EADDRNOTAVAIL, f"there is no interface {chosen} with an address")
    return mine if mine in found else found[0]


def listen(address: str, now: Callable[[], int] = time.time_ns) -> int:
    """Answer pings at `address` with this rank's time until the process ends; the port. OSError: no such address."""
    family = socket.getaddrinfo(address, None, type=socket.SOCK_STREAM)[0][0]
    server = socket.create_server((address, 0), family=family, backlog=BACKLOG)
    threading.Thread(target=_answer, args=(server, now), name="llama_dist-pings", daemon=True).start()
    return int(server.getsockname()[1])


def _answer(server: socket.socket, now: Callable[[], int]) -> None:
    while True:
        try:
            connection, _ = server.accept()
            with connection:
                connection.settimeout(QUIET)
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                while connection.recv(PING.size):
                    connection.sendall(PING.pack(now()))
        except OSError:  # whoever asked is gone or quiet; the next may ask
            continue


def await_port(address: Address, seconds: float) -> None:
    """Until somebody listens at `address`. OSError: why nobody could be reached within `seconds`."""
    deadline = time.monotonic() + seconds
    while True:
        left = max(deadline - time.monotonic(), 0.1)
        try:
            socket.create_connection(address, timeout=left).close()
            return
        except OSError as err:
            if time.monotonic() + LOOK_AGAIN > deadline:
                raise OSError(err.strerror or str(err)) from None
        time.sleep(LOOK_AGAIN)


def _begin(address: Address) -> tuple[socket.socket, int]:
    family, kind, proto, _, target = socket.getaddrinfo(*address, type=socket.SOCK_STREAM)[0]
    s = socket.socket(family, kind, proto)
    s.setblocking(False)
    return s, s.connect_ex(target)


def connect_all(targets: Mapping[int, Address], seconds: float) -> dict[int, str]:
    """Open a connection to each rank's address and close it again; what went wrong, by rank."""
    failed: dict[int, str] = {}
    ranks = sorted(targets)
    batches = [ranks[i : i + AT_ONCE] for i in range(0, len(ranks), AT_ONCE)]
    for batch in batches:
        failed.update(_connect({rank: targets[rank] for rank in batch}, seconds / len(batches)))
    return failed


def _connect(targets: Mapping[int, Address], seconds: float) -> dict[int, str]:
    failed: dict[int, str] = {}
    waiting: dict[int, tuple[int, socket.socket]] = {}
    poll, deadline = select.poll(), time.monotonic() + seconds
    for rank, address in targets.items():
        try:
            s, code = _begin(address)
        except OSError as err:
            failed[rank] = err.strerror or str(err)
            continue
        if code in (0, errno.EINPROGRESS):
            waiting[s.fileno()] = rank, s
            poll.register(s, select.POLLOUT)
        else:
            failed[rank] = os.strerror(code)
            s.close()
    while waiting and (left := deadline - time.monotonic()) > 0:
        for fd, _ in poll.poll(left * 1000):
            rank, s = waiting.pop(fd)
            poll.unregister(fd)
            code = s.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            if code:
                failed[rank] = os.strerror(code)
            s.close()
    for rank, s in waiting.values():
        failed[rank] = f"no answer in {seconds:g} s"
        s.close()
    return failed


def clock_offset(address: Address, seconds: float, now: Callable[[], int] = time.time_ns) -> tuple[float, float]:
    """Seconds by which the clock at `address` is ahead of this one, and by how much that may be wrong.

    The answer was given at some moment between asking and hearing it, so half of the shortest of ROUND_TRIPS bounds the
    error (Cristian 1989). OSError: no answer.
    """
    best = (0.0, float("inf"))
    with socket.create_connection(address, timeout=seconds) as s:
        s.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        deadline = time.monotonic() + seconds
        for _ in range(ROUND_TRIPS):
            asked, began = now(), time.perf_counter_ns()
            s.sendall(PING.pack(0))
            answer = b""
            while len(answer) < PING.size:
                piece = s.recv(PING.size - len(answer))
                if not piece:
                    raise ConnectionResetError(errno.ECONNRESET, os.strerror(errno.ECONNRESET))
                answer += piece
            took = time.perf_counter_ns() - began
            if took / 2e9 < best[1]:
                best = (PING.unpack(answer)[0] - asked - took / 2) / 1e9, took / 2e9
            if time.monotonic() > deadline:
                break
    return best
