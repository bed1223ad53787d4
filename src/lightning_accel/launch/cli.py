"""The command `lightning-accel`: starts programs on several processes, and says how a process sees itself."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from lightning_accel.launch import ssh_run

_FAILED = 1

_EXIT_CODES = (
    "Exit codes: 0 if all processes ended well; that of the process that failed first, 128 + n if signal n ended it; "
    "130 after Ctrl-C; 255 if ssh did not reach a host; 2 for wrong arguments; 1 for what went wrong before a process started."
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit code."""
    parser = argparse.ArgumentParser(prog="lightning-accel", description=__doc__, epilog=_EXIT_CODES)
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    commands.add_parser(
        "run", help="start a program on the processes of this node (torchrun with network tuning)", add_help=False
    )
    ssh_parser = commands.add_parser(
        "ssh-run",
        help="start a program on several machines over ssh",
        description="Starts a program on several machines over ssh, from one of them. All need the same files in the same "
        "places, and a login without a password. Output is printed with host and rank before it; Ctrl-C, or the failure of one "
        "host, ends all.",
        epilog=_EXIT_CODES,
    )
    ssh_run.add_arguments(ssh_parser)
    commands.add_parser("env", help="print rank, world size and addresses as this process sees them, and from which variables")
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words[:1] == ["run"]:
        return _run(words[1:])
    args = parser.parse_args(words)
    return ssh_run.ssh_run(args) if words[0] == "ssh-run" else _print_environment()


def _print_environment() -> int:
    from lightning_accel.environment import detect

    try:
        print(detect())
    except ValueError as error:
        print(f"lightning-accel env: {error}", file=sys.stderr)
        return _FAILED
    return 0


def _run(words: list[str]) -> int:
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import get_args_parser, run

    parser = get_args_parser()
    parser.prog = "lightning-accel run"
    parser.description = "Starts a program on the processes of this node: torchrun, with options for the network."
    parser.epilog = _EXIT_CODES
    tuning = parser.add_argument_group("network", "set in the processes' environment, and printed")
    for option in _TUNING:
        help_text = f"{option.help} ({', '.join(option.variables)})"
        tuning.add_argument(f"--{option.name}", type=option.kind, help=help_text, metavar=option.metavar)
    args = parser.parse_args(words)
    for option in _TUNING:
        value = getattr(args, option.name.replace("-", "_"))
        if value is None:
            continue
        for variable in option.variables:
            os.environ[variable] = str(value)
            print(f"lightning-accel run: {variable}={value}", file=sys.stderr)
    try:
        run(args)  # type: ignore[no-untyped-call]
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        code = failure.exitcode
        end = f"signal {-code}" if code < 0 else f"exit code {code}"
        print(f"lightning-accel run: rank {rank} failed first, with {end}; its own output says why", file=sys.stderr)
        return 128 - code if code < 0 else code
    except SignalException as error:
        print(f"lightning-accel run: ended by signal {error.sigval:d}, and its processes with it", file=sys.stderr)
        return 128 + int(error.sigval)
    except (ValueError, OSError) as error:
        print(f"lightning-accel run: {error}", file=sys.stderr)
        return _FAILED
    return 0


def _positive(text: str) -> int:
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1: got {value}")
    return value


@dataclass(frozen=True)
class _Option:
    """An option of the network, and the variables it sets."""

    name: str
    variables: tuple[str, ...]
    kind: Callable[[str], str | int]
    metavar: str
    help: str


_TUNING = (
    _Option(
        "interface", ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME"), str, "NAME", "network interface for messages, such as eth0"
    ),
    _Option("nccl-socket-threads", ("NCCL_SOCKET_NTHREADS",), _positive, "N", "threads of NCCL's TCP transport a connection"),
    _Option("nccl-sockets-per-thread", ("NCCL_NSOCKS_PERTHREAD",), _positive, "N", "sockets of each; at most 64 in all"),
    _Option("omp-threads", ("OMP_NUM_THREADS",), _positive, "N", "threads for CPU work in each process"),
)


if __name__ == "__main__":
    sys.exit(main())
