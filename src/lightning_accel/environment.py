"""Rank, world size and node of this process, from the variables that launchers set. The only reader of os.environ."""

from __future__ import annotations

import os
import socket


def node_name() -> str:
    """A name that processes on one machine share and others do not.

    torchrun's GROUP_RANK or Lightning's NODE_RANK where one is set (several hosts may carry the same name), else the
    host's name.
    """
    for variable in ("GROUP_RANK", "NODE_RANK"):
        if value := os.environ.get(variable):
            return f"{variable}={value}"
    return socket.gethostname()
