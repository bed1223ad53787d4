"""A host that is gone is noticed within minutes, by the kernels' own probes on the connections between ranks.

A collective waits for a rank that may be slow for good reasons, so its timeout is long (half an hour unless `timeout` says
less); and TCP itself gives up after a quarter of an hour, or never where it has nothing to send. A host that was unplugged or has
crashed is another matter: kernels answer for their processes however busy these are, so silence there means that nobody is left.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import socket
import sys
from collections.abc import Collection
from pathlib import Path

UNREACHABLE_SECONDS = 120.0
"""How long a host may be silent."""

_PROBES = 6


def open_sockets() -> dict[str, int]:
    """This process's sockets: descriptors by the kernel's names, which are never used twice. Empty without Linux's /proc."""
    sockets = {}
    if sys.platform == "linux":
        with contextlib.suppress(OSError):
            for link in Path("/proc/self/fd").iterdir():
                with contextlib.suppress(OSError):  # closed since
                    sockets[os.readlink(link)] = int(link.name)  # noqa: PTH115 - it is no path
    return {name: descriptor for name, descriptor in sockets.items() if name.startswith("socket:")}


def watch_connections(others: Collection[str] = ()) -> None:
    """Lets this process's TCP connections fail once the host at the other end has been silent for UNREACHABLE_SECONDS.

    Whatever waits for one of them fails then. All that are open now: torch's gloo and its stores have no such option, and do not
    tell which are theirs. A connection with a TCP_USER_TIMEOUT, or with keep-alive probes, keeps what it has. It adds no thread,
    and a probe on each idle connection every few seconds. Nothing without Linux's /proc.

    A process that is stopped (SIGSTOP) for so long while others send to it counts as gone, as it takes nothing: TCP_USER_TIMEOUT
    does not tell that from silence. So `others` do not get it, but probes, which end no connection to a host that is there.

    Args:
        others: sockets, named as by `open_sockets`, that may belong to others: those from before there were ranks to talk to.
    """
    if sys.platform == "linux":
        user_timeout = (socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT)
        keep_alive = (socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        seconds = max(1, round(UNREACHABLE_SECONDS / 8))
        for name, descriptor in open_sockets().items():
            if _get(descriptor, *user_timeout) != 0:  # None is no TCP socket
                continue
            if _get(descriptor, *keep_alive) == 0:
                _set(descriptor, socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 2 * seconds)
                _set(descriptor, socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, seconds)
                _set(descriptor, socket.IPPROTO_TCP, socket.TCP_KEEPCNT, _PROBES)
                _set(descriptor, *keep_alive, 1)
            if name not in others:
                _set(descriptor, *user_timeout, round(1000 * UNREACHABLE_SECONDS))


# Not by Python's sockets: making one of a descriptor may change whether it blocks.


def _get(descriptor: int, level: int, option: int) -> int | None:
    value = ctypes.c_int()
    size = ctypes.c_uint(ctypes.sizeof(value))
    failed = ctypes.CDLL(None).getsockopt(descriptor, level, option, ctypes.byref(value), ctypes.byref(size))
    return None if failed else value.value


def _set(descriptor: int, level: int, option: int, value: int) -> None:
    integer = ctypes.c_int(value)
    ctypes.CDLL(None).setsockopt(descriptor, level, option, ctypes.byref(integer), ctypes.sizeof(integer))
