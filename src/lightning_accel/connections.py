"""A host that is gone is noticed within minutes, by the kernels' own probes on the connections between ranks.

A collective waits for a rank that may be slow for good reasons, so its timeout is long (half an hour unless `timeout` says
less); and TCP itself gives up after a quarter of an hour, or never where it has nothing to send. A host that was unplugged or has
crashed is another matter: kernels answer for their processes however busy these are, so silence there means that nobody is left.
"""

from __future__ import annotations

import ctypes
import socket
from pathlib import Path

UNREACHABLE_SECONDS = 120.0
"""How long a host may be silent."""


def watch_connections() -> None:
    """Lets this process's TCP connections fail once the host at the other end has been silent for UNREACHABLE_SECONDS.

    Whatever waits for one of them fails then. All that are open now: torch's gloo and its stores have no such option, and do not
    tell which are theirs; others, such as a logger's, lose nothing by it. It adds no thread, and a probe on each idle connection
    every few seconds. A process that is stopped (SIGSTOP) for so long while others send to it counts as gone.
    """
    milliseconds = round(1000 * UNREACHABLE_SECONDS)
    options = (
        (socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, milliseconds),  # refused by what is no TCP socket
        (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, max(1, milliseconds // 4000)),
        (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, max(1, milliseconds // 8000)),
        (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    )
    # Not by Python's sockets: making one of a descriptor may change whether it blocks.
    setsockopt = ctypes.CDLL(None).setsockopt
    for descriptor in Path("/proc/self/fd").iterdir():
        for level, name, value in options:
            integer = ctypes.c_int(value)
            if setsockopt(int(descriptor.name), level, name, ctypes.byref(integer), ctypes.sizeof(integer)) != 0:
                break
