"""Arguments of command lines: of programs that join other processes, and of the commands that start them."""

from __future__ import annotations

import argparse
import socket
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds --backend, --rank, --world-size, --host and --port: the arguments of `init_process_group` with these names.

    Example:
        >>> import argparse
        >>> parser = argparse.ArgumentParser()
        >>> add_arguments(parser)
        >>> parsed = parser.parse_args(["--rank", "0", "--world-size", "1"])
        >>> init_process_group(  # doctest: +SKIP
        ...     parsed.backend, rank=parsed.rank, world_size=parsed.world_size, host=parsed.host, port=parsed.port
        ... )
    """
    group = parser.add_argument_group("processes", "default: from torchrun, Open MPI, MPICH or SLURM, else a single process")
    group.add_argument("--backend", help="torch.distributed's backend (default: nccl with a CUDA device, else gloo)")
    group.add_argument("--rank", type=int, help="rank of this process; needs --world-size")
    group.add_argument("--world-size", type=int, help="number of processes; needs --rank")
    group.add_argument("--host", help="name or address of rank 0 (default: MASTER_ADDR, or the launcher's variables)")
    group.add_argument("--port", type=int, help="port of the rendezvous on rank 0's host (default: MASTER_PORT, else 29500)")


def positive(text: str) -> int:
    """Reads an integer of at least 1."""
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1: got {value}")
    return value


def port(text: str) -> int:
    """Reads a port number."""
    if not 1 <= (value := int(text)) <= 65535:
        raise argparse.ArgumentTypeError(f"must be from 1 to 65535: got {value}")
    return value


def name(text: str) -> str:
    """Reads a name, which must not be empty."""
    if not text:
        raise argparse.ArgumentTypeError("must not be empty")
    return text


def script_arguments(script: str, parsed: Sequence[str], words: Sequence[str]) -> list[str]:
    """Returns the script's arguments, with a "--" right after the script's name put back: argparse drops it.

    Args:
        script: Name of the script.
        parsed: The script's arguments as argparse returned them.
        words: The whole command line, which ends with these arguments.
    """
    before = list(words[: len(words) - len(parsed)])
    return ["--", *parsed] if before[-2:] == [script, "--"] else list(parsed)


def interface(text: str) -> str:
    """Reads the name of a network interface of this machine, or several with commas between."""
    if problem := interfaces_problem(name(text)):
        raise argparse.ArgumentTypeError(problem)
    return text


def interfaces_problem(text: str) -> str | None:
    """Says which of the interfaces named in `text`, with commas between, this machine has not; None if it has all."""
    known = [known for _, known in socket.if_nameindex()]
    missing = [part for part in text.split(",") if part not in known]
    return f"this machine has no interface {missing[0]!r}: it has {', '.join(known)}" if missing else None


@dataclass(frozen=True)
class NetworkOption:
    """A command-line option of the network, and the environment variables it sets."""

    name: str
    variables: tuple[str, ...]
    kind: Callable[[str], str | int]
    metavar: str
    help: str


NETWORK_OPTIONS = (
    NetworkOption(
        "interface",
        ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME"),
        interface,
        "NAME",
        "network interface for messages, such as eth0; `lightning-accel env` lists them",
    ),
    NetworkOption("nccl-socket-threads", ("NCCL_SOCKET_NTHREADS",), positive, "N", "NCCL's TCP threads per connection"),
    NetworkOption("nccl-sockets-per-thread", ("NCCL_NSOCKS_PERTHREAD",), positive, "N", "sockets per thread; at most 64 in all"),
    NetworkOption("omp-threads", ("OMP_NUM_THREADS",), positive, "N", "threads for CPU work in each process"),
)


def add_network_options(parser: argparse.ArgumentParser, *, is_here: bool = True) -> None:
    """Adds `NETWORK_OPTIONS` to a parser.

    Args:
        parser: Parser of a command.
        is_here: Whether the processes run on this machine; others may have other interfaces.
    """
    group = parser.add_argument_group("network", "set in the environment of the processes, and printed")
    for option in NETWORK_OPTIONS:
        help_text = f"{option.help} ({', '.join(option.variables)})"
        kind = name if option.kind is interface and not is_here else option.kind
        group.add_argument(f"--{option.name}", type=kind, help=help_text, metavar=option.metavar)


def given_network_options(args: argparse.Namespace) -> Iterator[tuple[NetworkOption, str | int]]:
    """Yields the network options that the command line gives, with their values."""
    for option in NETWORK_OPTIONS:
        if (value := getattr(args, option.name.replace("-", "_"))) is not None:
            yield option, value
