"""Which of this machine's addresses and interfaces the other hosts can reach.

gloo asks what the machine's own name means. On Debian that is 127.0.1.1, and ranks of several hosts then wait for each
other on their own loopbacks. The address a host uses towards the others is the one they reach it by.
"""

from __future__ import annotations

import ctypes
import ipaddress
import os
import socket
import struct
from collections.abc import Sequence


def address_towards(host: str, port: int) -> str:
    """This machine's own address on the way to `host`, a name or an address. Nothing is sent. OSError: no way there."""
    for family, kind, proto, _, target in socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM):
        with socket.socket(family, kind, proto) as s:
            s.connect(target)
            return str(s.getsockname()[0])
    raise OSError(f"{host} has no address")


def is_loopback(address: str) -> bool:
    return ipaddress.ip_address(address.partition("%")[0]).is_loopback


class _Interface(ctypes.Structure):
    """The head of getifaddrs' struct ifaddrs."""


_Interface._fields_ = [
    ("next", ctypes.POINTER(_Interface)),
    ("name", ctypes.c_char_p),
    ("flags", ctypes.c_uint),
    ("address", ctypes.c_void_p),
]
_LENGTHS = {socket.AF_INET: (4, 4), socket.AF_INET6: (8, 16)}  # where in the sockaddr the address lies, its bytes


def _address(sockaddr: int | None) -> str | None:
    if not sockaddr:
        return None
    (family,) = struct.unpack("=H", ctypes.string_at(sockaddr, 2))
    if family not in _LENGTHS:
        return None
    start, length = _LENGTHS[family]
    return socket.inet_ntop(family, ctypes.string_at(sockaddr + start, length))


def _interfaces() -> list[tuple[str, str]]:
    """Every interface's name with each of its addresses."""
    libc = ctypes.CDLL(None, use_errno=True)
    first = ctypes.POINTER(_Interface)()
    if libc.getifaddrs(ctypes.byref(first)):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    found = []
    try:
        entry = first
        while entry:
            address = _address(entry.contents.address)
            if address is not None:
                found.append((os.fsdecode(entry.contents.name), address))
            entry = entry.contents.next
        return found
    finally:
        libc.freeifaddrs(first)


def interface_of(address: str) -> str | None:
    """The name of the interface that has `address`."""
    bare = address.partition("%")[0]
    return next((name for name, own in _interfaces() if own == bare), None)


def addresses_of(interface: str) -> list[str]:
    """The addresses of an interface; none where there is no such interface."""
    return [own for name, own in _interfaces() if name == interface]


def interface_between(mine: str, others: Sequence[str], port: int) -> str | None:
    """The interface to listen on, given the address every rank uses towards the store; None: all of it is loopback.

    The store's own host may know itself by a loopback address only; then what the others are reached by counts.
    """
    if is_loopback(mine):
        far = next((address for address in others if not is_loopback(address)), None)
        if far is None:
            return None
        mine = address_towards(far, port)
    return interface_of(mine)
