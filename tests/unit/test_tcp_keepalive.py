"""The options that make kernels notice a silent host; tests/distributed/test_launchers.py unplugs one."""

import os
import socket
from pathlib import Path

from helpers.ranks import run_script
from lightning_accel.transport import tcp_keepalive as connections


def test_open_connections_are_watched_and_otherwise_as_they_were(monkeypatch):
    """Catches options in the wrong unit, and descriptors that do not block any more, or not as they did."""
    monkeypatch.setattr(connections, "UNREACHABLE_SECONDS", 40.0)
    descriptors = set(Path("/proc/self/fd").iterdir())
    before = connections.open_sockets()
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as connection:
        answering, _ = server.accept()
        socket.setdefaulttimeout(1)  # a socket object made of a descriptor would take it over
        try:
            connections.watch_connections(before)
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
                assert one.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT) == 6
                assert os.get_blocking(one.fileno())
            assert late.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 0
    assert set(Path("/proc/self/fd").iterdir()) == descriptors


def test_what_others_have_set_stays_and_their_peers_need_not_read():
    """Catches a logger's connection that gets other times than it asked for, or that ends while its peer is there but busy."""
    keep_alive, user_timeout = (socket.SOL_SOCKET, socket.SO_KEEPALIVE), (socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT)
    idle = (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE)
    with socket.socket() as bounded, socket.socket() as probed, socket.socket() as plain, socket.socketpair()[0]:
        bounded.setsockopt(*user_timeout, 20_000)
        bounded.setsockopt(*idle, 7)
        probed.setsockopt(*keep_alive, 1)
        probed.setsockopt(*idle, 7)
        before = connections.open_sockets()
        with socket.socket() as new:
            connections.watch_connections(before)
            assert new.getsockopt(*user_timeout) == 120_000
        assert [one.getsockopt(*user_timeout) for one in (bounded, probed, plain)] == [20_000, 0, 0]
        assert [one.getsockopt(*keep_alive) for one in (bounded, probed, plain)] == [0, 1, 1]
        assert [one.getsockopt(*idle) for one in (bounded, probed, plain)] == [7, 7, 30]


def test_nothing_is_done_where_there_is_no_proc(monkeypatch, tmp_path):
    """Catches a training that cannot start in a container without /proc, or on another system."""
    with socket.socket() as one:
        monkeypatch.setattr(connections, "Path", lambda path: tmp_path / "missing")
        connections.watch_connections()
        monkeypatch.undo()
        monkeypatch.setattr(connections.sys, "platform", "darwin")
        monkeypatch.delattr(socket, "TCP_USER_TIMEOUT")
        connections.watch_connections()
        monkeypatch.undo()
        assert one.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 0


GROUPS = """
import socket
import torch
import lightning_accel as accel
from lightning_accel.transport import tcp_keepalive as connections

def timeouts(names):
    sockets = connections.open_sockets()
    still_open = [sockets[name] for name in names if name in sockets]  # torch has some for a moment only
    found = [connections._get(one, socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) for one in still_open]
    return {found[i] for i in range(len(found)) if found[i] is not None}

foreign = socket.create_server(("127.0.0.1", 0))
before = set(connections.open_sockets())
accel.init_process_group("gloo")
joined = set(connections.open_sockets()) - before
model = torch.nn.Linear(2, 2)
ddp = accel.wrap(model, torch.optim.SGD(model.parameters(), lr=0.1), "bytegrad")
made = set(connections.open_sockets()) - before - joined
found = [sorted(timeouts(names)) for names in (before, joined, made)]
print(found)
accel.unwrap(ddp)
accel.destroy_process_group()
"""


def test_ranks_watch_the_connections_between_them(tmp_path):
    """Catches connections of a group or a store that nobody watches, and others that are watched with them."""
    script = tmp_path / "script.py"
    script.write_text(GROUPS)
    assert run_script(script, 2, folder=tmp_path) == ["[[0], [120000], [120000]]\n"] * 2
