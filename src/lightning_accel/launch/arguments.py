"""Kinds of arguments on the command line: the network's, and those that are a script's own."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass


def positive(text: str) -> int:
    """Reads a whole number above 0."""
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1: got {value}")
    return value


def port(text: str) -> int:
    """Reads a port."""
    if not 1 <= (value := int(text)) <= 65535:
        raise argparse.ArgumentTypeError(f"must be from 1 to 65535: got {value}")
    return value


def name(text: str) -> str:
    """Reads a name."""
    if not text:
        raise argparse.ArgumentTypeError("must not be empty")
    return text


def of_script(script: str, parsed: Sequence[str], words: Sequence[str]) -> list[str]:
    """The script's arguments, with a "--" right after its name, which argparse takes for its own.

    Args:
        script: its name.
        parsed: what argparse made of the arguments.
        words: the command line, which ends with them.
    """
    before = list(words[: len(words) - len(parsed)])
    return ["--", *parsed] if before[-2:] == [script, "--"] else list(parsed)


@dataclass(frozen=True)
class Option:
    """An option of the network, and the variables it sets."""

    name: str
    variables: tuple[str, ...]
    kind: Callable[[str], str | int]
    metavar: str
    help: str


TUNING = (
    Option(
        "interface", ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME"), name, "NAME", "network interface for messages, such as eth0"
    ),
    Option("nccl-socket-threads", ("NCCL_SOCKET_NTHREADS",), positive, "N", "threads of NCCL's TCP transport a connection"),
    Option("nccl-sockets-per-thread", ("NCCL_NSOCKS_PERTHREAD",), positive, "N", "sockets of each; at most 64 in all"),
    Option("omp-threads", ("OMP_NUM_THREADS",), positive, "N", "threads for CPU work in each process"),
)


def add_tuning(parser: argparse.ArgumentParser) -> None:
    """Adds the options of the network."""
    group = parser.add_argument_group("network", "set in the processes' environment, and printed")
    for option in TUNING:
        help_text = f"{option.help} ({', '.join(option.variables)})"
        group.add_argument(f"--{option.name}", type=option.kind, help=help_text, metavar=option.metavar)


def tuning_of(args: argparse.Namespace) -> Iterator[tuple[Option, str | int]]:
    """Those that were given."""
    for option in TUNING:
        if (value := getattr(args, option.name.replace("-", "_"))) is not None:
            yield option, value
