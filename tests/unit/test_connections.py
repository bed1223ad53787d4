"""The options that make kernels notice a silent host; tests/distributed/test_launchers.py unplugs one."""

import os
import socket
from pathlib import Path

from lightning_accel import connections


def test_open_connections_are_watched_and_otherwise_as_they_were(monkeypatch):
    """Catches options in the wrong unit, and descriptors that do not block any more, or not as they did."""
    monkeypatch.setattr(connections, "UNREACHABLE_SECONDS", 40.0)
    descriptors = set(Path("/proc/self/fd").iterdir())
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as connection:
        answering, _ = server.accept()
        socket.setdefaulttimeout(1)  # a socket object made of a descriptor would take it over
        try:
            connections.watch_connections()
        finally:
            socket.setdefaulttimeout(None)
        late = socket.create_connection(server.getsockname())
        accepted, _ = server.accept()  # as the server's options say
        with answering, late, accepted:
            for one in (connection, answering, accepted):
                assert one.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
                assert one.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 40_000
                assert one.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) == 10
                assert one.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL) == 5
                assert os.get_blocking(one.fileno())
            assert late.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 0
    assert set(Path("/proc/self/fd").iterdir()) == descriptors
