"""Two hosts with a cable between them, made of network namespaces: each has addresses, ports and a loopback of its own."""

import contextlib
import os
import secrets
import shutil
import signal
from collections.abc import Iterator
from typing import NamedTuple

import pytest

from helpers import programs

DEVICE = "cable"
"""The name of its end on each of them."""


class Host(NamedTuple):
    """A namespace.

    Attributes:
        name: of the namespace.
        address: on the cable.
    """

    name: str
    address: str

    def inside(self, *words: object) -> tuple[object, ...]:
        """A command line that runs these words there."""
        return ("ip", "netns", "exec", self.name, *words)

    def unplug(self) -> None:
        """Pulls the cable."""
        _ip("-n", self.name, "link", "set", DEVICE, "down")


@contextlib.contextmanager
def two_hosts(subnet: str) -> Iterator[list[Host]]:
    """Addresses are 1 and 2 in `subnet`, such as "10.78.0". Skips the test where there can be no hosts."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("network namespaces need root and ip (iproute2)")
    tag = secrets.token_hex(3)  # not the process's id: a namespace outlives a process that was killed, and ids come again
    hosts = [Host(f"accel{tag}{end}", f"{subnet}.{number}") for number, end in ((1, "a"), (2, "b"))]
    first, second = hosts
    try:
        for words in (
            *(("netns", "add", host.name) for host in hosts),
            ("link", "add", DEVICE, "netns", first.name, "type", "veth", "peer", "name", DEVICE, "netns", second.name),
        ):
            if (done := programs.run("ip", *words)).returncode != 0:
                pytest.skip(f"network namespaces cannot be made here: {done.stderr.strip()}")
        for host in hosts:
            _ip("-n", host.name, "link", "set", "lo", "up")
            _ip("-n", host.name, "address", "add", f"{host.address}/24", "dev", DEVICE)
            _ip("-n", host.name, "link", "set", DEVICE, "up")
        yield hosts
    finally:
        for host in hosts:
            for pid in programs.run("ip", "netns", "pids", host.name).stdout.split():
                with contextlib.suppress(ProcessLookupError):  # what a broken connection has left behind
                    os.kill(int(pid), signal.SIGKILL)
            programs.run("ip", "netns", "delete", host.name)


def _ip(*words: object) -> None:
    done = programs.run("ip", *words)
    assert done.returncode == 0, done.stderr
