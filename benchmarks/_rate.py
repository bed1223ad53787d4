"""Measures a link's throughput: one end of a TCP connection, which sends zeros, receives them, or both, and prints bit/s.

python _rate.py listen|connect ADDRESS PORT SECONDS send|receive|both
"""

from __future__ import annotations

import contextlib
import socket
import sys
import threading
import time

_CHUNK = bytes(1 << 20)


def connect(role: str, address: str, port: int) -> socket.socket:
    if role == "listen":
        with socket.create_server((address, port)) as server:
            return server.accept()[0]
    while True:  # retried until the other end listens
        try:
            return socket.create_connection((address, port))
        except ConnectionRefusedError:
            time.sleep(0.05)


def send(connection: socket.socket, seconds: float) -> None:
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        connection.sendall(_CHUNK)
    connection.shutdown(socket.SHUT_WR)


def receive(connection: socket.socket) -> float:
    received = 0
    started = time.perf_counter()
    while part := connection.recv(len(_CHUNK)):
        received += len(part)
    return 8 * received / (time.perf_counter() - started)


def main() -> None:
    role, address, port, seconds, what = sys.argv[1:]
    with contextlib.closing(connect(role, address, int(port))) as connection:
        sender = threading.Thread(target=send, args=(connection, float(seconds)))
        if what in ("send", "both"):
            sender.start()
        if what in ("receive", "both"):
            print(receive(connection))
        if what in ("send", "both"):
            sender.join()


if __name__ == "__main__":
    main()
