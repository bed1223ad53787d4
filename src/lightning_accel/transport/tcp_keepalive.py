"""Detects lost hosts within minutes, by the kernel's own probes on the connections between ranks.

A rank may be slow for good reasons, so a collective's timeout is long (half an hour unless `timeout` is shorter). TCP itself
gives up after a quarter of an hour, or never if it has nothing to send. But a kernel answers probes however busy its processes
are, so silence means that the host has crashed or was unplugged.
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
"""Time for which a host may be silent."""

_PROBES = 6


def open_sockets() -> dict[str, int]:
    """Returns {kernel's name: descriptor} of this process's sockets; names are never reused. Empty without Linux's /proc."""
    sockets = {}
    if sys.platform == "linux":
        with contextlib.suppress(OSError):
            for link in Path("/proc/self/fd").iterdir():
                with contextlib.suppress(OSError):  # closed meanwhile
                    sockets[os.readlink(link)] = int(link.name)  # noqa: PTH115 - the target is no path
    return {name: descriptor for name, descriptor in sockets.items() if name.startswith("socket:")}


def watch_connections(others: Collection[str] = ()) -> None:
    """Makes this process's TCP connections fail once the host at the other end has been silent for UNREACHABLE_SECONDS.

    Whatever waits on such a connection fails then. The call changes all connections that are open now, because torch's gloo and
    stores neither have such an option nor tell which connections are theirs. A connection that has a TCP_USER_TIMEOUT or
    keep-alive probes keeps them. The cost is a probe on each idle connection every few seconds, and no thread. Without Linux's
    /proc the call does nothing.

    TCP_USER_TIMEOUT cannot tell a silent host from a process that is stopped (SIGSTOP) for so long while others send to it. So
    `others` get no timeout but only probes, which never end a connection to a host that is up.

    Args:
        others: Sockets, named as by `open_sockets`, that may belong to others because they were open before ranks connected.
    """
    if sys.platform == "linux":
        user_timeout = (socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT)
        keep_alive = (socket.SOL_SOCKET, socket.SO_KEEPALIVE)
        seconds = max(1, round(UNREACHABLE_SECONDS / 8))
        for name, descriptor in open_sockets().items():
            if _get(descriptor, *user_timeout) != 0:  # None: this is no TCP socket
                continue
            if _get(descriptor, *keep_alive) == 0:
                _set(descriptor, socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 2 * seconds)
                _set(descriptor, socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, seconds)
                _set(descriptor, socket.IPPROTO_TCP, socket.TCP_KEEPCNT, _PROBES)
                _set(descriptor, *keep_alive, 1)
            if name not in others:
                _set(descriptor, *user_timeout, round(1000 * UNREACHABLE_SECONDS))


# Not through Python's sockets: making one from a descriptor may change whether it blocks.


def _get(descriptor: int, level: int, option: int) -> int | None:
    value = ctypes.c_int()
    size = ctypes.c_uint(ctypes.sizeof(value))
    failed = ctypes.CDLL(None).getsockopt(descriptor, level, option, ctypes.byref(value), ctypes.byref(size))
    return None if failed else value.value


def _set(descriptor: int, level: int, option: int, value: int) -> None:
    integer = ctypes.c_int(value)
    ctypes.CDLL(None).setsockopt(descriptor, level, option, ctypes.byref(integer), ctypes.sizeof(integer))
