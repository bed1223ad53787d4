"""The command `lightning-accel`: starts programs on several processes, tests the machine, and prints what it is."""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import threading
import time
from collections.abc import Sequence

from lightning_accel.environment import DEFAULT_PORT, detect
from lightning_accel.launch import ssh_run
from lightning_accel.launch.arguments import add_network_options, given_network_options, positive, script_arguments
from lightning_accel.transport.long_waits import LongWait
from lightning_accel.transport.tcp_keepalive import watch_connections
from lightning_accel.version import __version__

_FAILED = 1

_WATCH_SECONDS = 10.0

_SAY_SECONDS = 0.5

_EXIT_CODES = """\
exit codes:
  0        all processes succeeded
  1        nothing was started; the message says why
  2        wrong arguments
  128 + n  signal n ended the process that failed first; 130 after Ctrl-C
  255      ssh could not reach a host, or lost the connection
  other    exit code of the process that failed first"""

_EXAMPLES = """\
examples:
  lightning-accel run --nproc-per-node 8 train.py --epochs 10
  lightning-accel run --nnodes 2 --node-rank 0 --master-addr host0 --nproc-per-node 8 --interface eth0 train.py
  lightning-accel ssh-run --host-list host0,host1:2222 --nproc-per-node 8 train.py
  lightning-accel test
  srun lightning-accel env

"""

_DESCRIPTION = "Starts programs on several processes and machines, tests this machine, and prints what training finds on it."


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words[:1] == ["run"]:
        return _run(words[1:])
    args = _make_parser().parse_args(words)
    if words[0] == "ssh-run":
        args.arguments = script_arguments(args.script, args.arguments, words)
        return ssh_run.ssh_run(args)
    return _test(args) if words[0] == "test" else _print_environment(as_json=args.json)


def _make_parser() -> argparse.ArgumentParser:
    keep_layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="lightning-accel", description=_DESCRIPTION, epilog=_EXAMPLES + _EXIT_CODES, formatter_class=keep_layout
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    commands.add_parser("run", help="start a program on this node: torchrun with network options", add_help=False)
    ssh_parser = commands.add_parser(
        "ssh-run",
        help="start a program on several machines over ssh",
        usage="%(prog)s (--host-list H1:22,H2 | --host-file PATH) [options] script [arguments ...]",
        description="Starts a program on several machines over ssh, from one of them. All machines need the same files in the\n"
        "same places, and a login without a password. Each line of output is printed after its host and rank. Ctrl-C, or\n"
        "the failure of one host, ends the program on all hosts.",
        epilog=_EXIT_CODES,
        formatter_class=keep_layout,
    )
    ssh_run.add_arguments(ssh_parser)
    test_parser = commands.add_parser(
        "test",
        help="check every codec and algorithm on this machine's processes",
        description="Trains for some steps with every codec and algorithm on several processes, and compares each result with\n"
        "what the specification says, computed by plain PyTorch. Takes about a minute. Exits with 1 if anything differs.\n"
        "Started by a launcher, such as srun, it takes the processes that are there.",
        formatter_class=keep_layout,
    )
    test_parser.add_argument(
        "--nproc-per-node", type=positive, metavar="N", help="number of processes (default: one for each GPU, at least 2)"
    )
    test_parser.add_argument("--device", choices=("cpu", "cuda"), help="where tensors lie (default: cuda with a GPU, else cpu)")
    env_parser = commands.add_parser(
        "env",
        help="print how this process sees itself and this machine: ranks, versions, kernels, GPUs, network, variables",
        description="Prints this process's rank, the number of processes and the rendezvous address, each with the variable it\n"
        "comes from; then, once for each machine, versions, kernels, GPUs, backends, network interfaces, threads and variables.\n"
        "Start it in place of a program: srun lightning-accel env",
        formatter_class=keep_layout,
    )
    env_parser.add_argument("--json", action="store_true", help="print one object of JSON")
    return parser


def _keep_watching() -> None:
    """Watches torchrun's own connections: it opens them inside a call that lasts as long as the program."""
    while True:
        time.sleep(_WATCH_SECONDS)
        watch_connections()


def _say_while_nodes_meet(args: argparse.Namespace) -> None:
    """Says, when it takes long, that this node waits for others; torchrun reports to its metrics when they have met."""
    from torch.distributed.elastic.metrics.api import MetricData, MetricHandler, configure

    have_met = threading.Event()

    class _Meetings(MetricHandler):
        def emit(self, metric_data: MetricData) -> None:
            if metric_data.name.endswith("_rendezvous.success"):
                have_met.set()

    def describe() -> str:
        place = args.rdzv_endpoint or f"{args.master_addr}:{args.master_port or DEFAULT_PORT}"
        this = f"node {args.node_rank}" if args.rdzv_backend == "static" else "a node"
        return f"Waiting for other nodes at {place}: this is {this} of {args.nnodes}"

    def say() -> None:
        wait = LongWait()
        while not have_met.wait(_SAY_SECONDS):
            wait.look(describe)

    configure(_Meetings(), "torchelastic")
    threading.Thread(target=say, daemon=True).start()


def _print_environment(*, as_json: bool) -> int:
    from lightning_accel.launch import report

    try:
        facts = report.describe(detect())
    except ValueError as error:
        print(f"lightning-accel env: {error}", file=sys.stderr)
        return _FAILED
    print(json.dumps(facts) if as_json else report.render(facts))
    return 0


def _test(args: argparse.Namespace) -> int:
    import torch

    gpus = torch.cuda.device_count() if args.device != "cpu" else 0
    device = args.device or ("cuda" if gpus else "cpu")
    if device == "cuda" and not gpus:
        print("lightning-accel test: --device cuda needs a GPU, and torch sees none here", file=sys.stderr)
        return _FAILED
    if detect().launcher != "single process":
        from lightning_accel.launch import self_test

        return self_test.main([device])
    processes = args.nproc_per_node or max(gpus, 2)
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # as torchrun would, with a warning
    return _run(["--standalone", "--nproc-per-node", str(processes), "-m", "lightning_accel.launch.self_test", device])


def _run(words: list[str]) -> int:
    args = _parse_run(words)
    for option, value in given_network_options(args):
        for variable in option.variables:
            os.environ[variable] = str(value)
            print(f"lightning-accel run: {variable}={value}", file=sys.stderr)
    threading.Thread(target=_keep_watching, daemon=True).start()
    if args.nnodes != "1":
        _say_while_nodes_meet(args)
    return _run_torchrun(args)


def _parse_run(words: list[str]) -> argparse.Namespace:
    from torch.distributed.run import get_args_parser

    parser = get_args_parser()
    parser.prog = "lightning-accel run"
    parser.usage = "%(prog)s [options] script [arguments ...]"
    parser.description = "Starts a program on the processes of this node: torchrun, with options for the network (at the end)."
    parser.epilog = _EXIT_CODES
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add_network_options(parser)
    args = parser.parse_args(words)
    args.training_script_args = script_arguments(args.training_script, args.training_script_args, words)
    _check_run(parser, args)
    return args


def _check_run(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Exits with a message for numbers that torchrun would not refuse, or would refuse with a traceback."""
    if re.fullmatch("-?[0-9]+", args.nproc_per_node) and int(args.nproc_per_node) < 1:
        parser.error(f"argument --nproc-per-node: must be at least 1: got {args.nproc_per_node}")
    if not re.fullmatch(r"[1-9][0-9]*(:[1-9][0-9]*)?", args.nnodes, re.ASCII):
        parser.error(f"argument --nnodes: must be a number of nodes, or a range such as 2:4: got {args.nnodes}")
    least, _, most = args.nnodes.partition(":")
    if int(least) > int(most or least):
        parser.error(f"argument --nnodes: the minimum must not be above the maximum: got {args.nnodes}")
    if args.max_restarts < 0:
        parser.error(f"argument --max-restarts: must be at least 0: got {args.max_restarts}")
    if args.master_port is not None and not 0 <= args.master_port <= 65535:
        parser.error(f"argument --master-port: must be from 0 to 65535: got {args.master_port}")
    if args.nnodes.isdecimal() and args.rdzv_backend == "static" and not 0 <= args.node_rank < int(args.nnodes):
        parser.error(f"argument --node-rank: must be at least 0 and below --nnodes {args.nnodes}: got {args.node_rank}")


def _run_torchrun(args: argparse.Namespace) -> int:
    """Runs torchrun; returns an exit code of `_EXIT_CODES` and prints a line of explanation for each failure."""
    from torch.distributed import DistError
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import RendezvousError
    from torch.distributed.run import run

    try:
        run(args)  # type: ignore[no-untyped-call]
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        code = failure.exitcode
        end = f"signal {-code}" if code < 0 else f"exit code {code}"
        print(f"lightning-accel run: rank {rank} failed first, with {end}; its own output says why", file=sys.stderr)
        return 128 - code if code < 0 else code
    except SignalException as error:
        print(f"lightning-accel run: signal {error.sigval:d} ended the command and its processes", file=sys.stderr)
        return 128 + int(error.sigval)
    except (DistError, RendezvousError) as error:
        reason = str(error).partition("\n")[0]
        print(
            f"lightning-accel run: the nodes did not meet: {reason} Check --master-addr, --master-port (is it free?), --nnodes "
            "and --node-rank, and that the command runs on all nodes",
            file=sys.stderr,
        )
        return _FAILED
    except (ValueError, OSError) as error:
        print(f"lightning-accel run: {error}", file=sys.stderr)
        return _FAILED
    return 0


if __name__ == "__main__":
    sys.exit(main())
