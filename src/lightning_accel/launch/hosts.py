"""Machines that `lightning-accel ssh-run` starts programs on, from a list or a file."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Host:
    """A machine that ssh can reach.

    Attributes:
        name: Host name or address, with or without "user@" before it.
        port: Port of its sshd.
        processes: Number of processes there; None if the list or the file does not say it.
    """

    name: str
    port: int
    processes: int | None = None

    @property
    def address(self) -> str:
        """The name without the user."""
        return self.name.rpartition("@")[2]


def parse_hosts(text: str) -> list[Host]:
    """Reads hosts from text such as "h1:22,user@h2:2222,h3"; the default port is 22.

    Raises:
        argparse.ArgumentTypeError: A host name, address or port is malformed, or a host is listed twice.
    """
    return _distinct(map(_parse_host, text.split(",")))


def read_hosts(path: str) -> list[Host]:
    """Reads a file with a host on each line, such as "h1", "user@h2:2222" or Open MPI's "h3 slots=4 max_slots=8".

    Empty lines, and what follows a "#", do not count. `slots` is the number of processes on the host; `max_slots` is ignored.

    Raises:
        argparse.ArgumentTypeError: The file cannot be read, or a line of it is malformed; the message has its number.
    """
    try:
        lines = Path(path).read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise argparse.ArgumentTypeError(f"cannot read {path}: {error}") from error
    hosts = []
    for number, line in enumerate(lines, start=1):
        words = re.sub(r"\s*=\s*", "=", line.partition("#")[0]).split()
        if words:
            try:
                hosts.append(_parse_line(words))
            except argparse.ArgumentTypeError as error:
                raise argparse.ArgumentTypeError(f"{path}, line {number}: {error}") from error
    if not hosts:
        raise argparse.ArgumentTypeError(f"{path} lists no host")
    return _distinct(hosts)


def _parse_line(words: Sequence[str]) -> Host:
    host = _parse_host(words[0])
    processes = None
    for word in words[1:]:
        key, _, value = word.partition("=")
        if key not in ("slots", "max_slots", "max-slots") or not re.fullmatch("[1-9][0-9]*", value, re.ASCII):
            raise argparse.ArgumentTypeError(f"after the host there may be slots=N: got {word!r}")
        processes = int(value) if key == "slots" else processes
    return Host(host.name, host.port, processes)


def _parse_host(word: str) -> Host:
    match = re.fullmatch(r"((?:[A-Za-z0-9_][A-Za-z0-9_.-]*@)?[A-Za-z0-9_][A-Za-z0-9_.-]*)(?::([0-9]{1,5}))?", word, re.ASCII)
    if match is None or not 1 <= int(match[2] or 22) <= 65535:
        raise argparse.ArgumentTypeError(f"hosts must be like h1:22,user@h2:2222: got {word!r}")
    return Host(match[1], int(match[2] or 22))


def _distinct(hosts: Iterable[Host]) -> list[Host]:
    listed = list(hosts)
    places = [(host.name, host.port) for host in listed]
    for place in places:
        if places.count(place) > 1:
            raise argparse.ArgumentTypeError(
                f"each host must be listed once: got {place[0]}:{place[1]} {places.count(place)} times"
            )
    return listed
