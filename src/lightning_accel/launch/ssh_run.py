"""`lightning-accel ssh-run`: starts a program on several machines over ssh, from one of them.

Each host runs `lightning_accel.launch.node_agent`, which gets its job through ssh's standard input; the job is
`lightning-accel run`.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from typing import IO

from lightning_accel.environment import DEFAULT_PORT, variable
from lightning_accel.launch.arguments import add_network_options, given_network_options, port, positive
from lightning_accel.launch.hosts import Host, parse_hosts, read_hosts
from lightning_accel.transport.tcp_keepalive import UNREACHABLE_SECONDS

_GRACE_SECONDS = 15.0
"""Time from asking a node to end to closing its connection, and from there to killing ssh: longer than the agent's own."""

_FAILED = 1

_SSH_FAILED = 255  # how ssh reports its own failures

_PROBES = 4

_SSH_OPTIONS = (
    "BatchMode=yes",
    f"ServerAliveInterval={UNREACHABLE_SECONDS / _PROBES:.0f}",  # ssh ends when a host is unplugged, and that ends the others
    f"ServerAliveCountMax={_PROBES}",
)


def parse_variable(text: str) -> tuple[str, str]:
    """Reads NAME=VALUE, or NAME alone, which takes its value from this process.

    Raises:
        argparse.ArgumentTypeError: The name is malformed, or stands alone and is not set here.
    """
    name, has_value, value = text.partition("=")
    if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name, re.ASCII):
        raise argparse.ArgumentTypeError(f"must be NAME or NAME=VALUE: got a name {name!r}")
    if not has_value:
        if (here := variable(name)) is None:
            raise argparse.ArgumentTypeError(f"{name} is not set here: give {name}=VALUE")
        value = here
    return name, value


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds ssh-run's arguments."""
    hosts = parser.add_mutually_exclusive_group(required=True)
    hosts.add_argument(
        "--host-list", dest="hosts", type=parse_hosts, metavar="H1:22,H2", help="hosts, with the ports of their sshds"
    )
    hosts.add_argument(
        "--host-file",
        dest="hosts",
        type=read_hosts,
        metavar="PATH",
        help="file with a host on each line, like h1:22, or Open MPI's: h1 slots=4",
    )
    parser.add_argument(
        "--nproc-per-node",
        type=positive,
        metavar="N",
        help="processes on each host (default: its slots in the host file, else 1)",
    )
    parser.add_argument("--master-addr", metavar="NAME", help="rendezvous host (default: the first host's name)")
    parser.add_argument("--master-port", type=port, default=DEFAULT_PORT, metavar="PORT", help="its port (default: %(default)s)")
    parser.add_argument("--ssh-option", action="append", default=[], metavar="NAME=VALUE", help="option for ssh (-o); repeatable")
    parser.add_argument(
        "--env", action="append", default=[], type=parse_variable, metavar="NAME[=VALUE]", help="variable to set; repeatable"
    )
    parser.add_argument("--workdir", default=os.getcwd(), metavar="PATH", help="folder to start in on each host (default: here)")  # noqa: PTH109
    parser.add_argument("--python", default=sys.executable, metavar="PATH", help="Python on each host (default: this one)")
    parser.add_argument("script", help="Python file to run")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="arguments of the script").required = False
    add_network_options(parser, is_here=False)


def ssh_run(args: argparse.Namespace) -> int:
    """Runs the command on all hosts; returns the exit code of the host that failed first, 130 after Ctrl-C, 1 without ssh."""
    if shutil.which("ssh") is None:
        _print_error("there is no ssh on PATH here: install OpenSSH's client")
        return _FAILED
    nodes = [_Node(host, rank, args) for rank, host in enumerate(args.hosts)]
    try:
        for node in nodes:
            node.start()
        return _wait(nodes)
    except KeyboardInterrupt:
        _end(nodes, signal.SIGINT)
        return 128 + signal.SIGINT
    finally:
        _end(nodes, signal.SIGTERM)


def _wait(nodes: list[_Node]) -> int:
    running = list(nodes)
    while running:
        for node in running:
            code = node.poll()
            if code is None:
                continue
            running.remove(node)
            if code != 0:
                lost = "could not be reached by ssh, or its connection was lost"
                what = lost if code == _SSH_FAILED else f"failed first, with exit code {code}"
                _print_error(f"{node.host.name} {what}; ending the other hosts")
                return code
            break
        time.sleep(0.05)
    return 0


def _end(nodes: list[_Node], number: signal.Signals) -> None:
    """Asks all nodes to end, then closes their connections, which ends their jobs, then kills ssh itself."""
    for action in (lambda node: node.send(number), _Node.hang_up, _Node.kill):
        for node in nodes:
            action(node)
        deadline = time.monotonic() + _GRACE_SECONDS
        while any(node.poll() is None for node in nodes):
            if time.monotonic() > deadline:
                break
            time.sleep(0.05)
        else:
            break
    for node in nodes:
        node.finish()


class _Node:
    """A host, and the ssh process connected to it."""

    def __init__(self, host: Host, rank: int, args: argparse.Namespace) -> None:
        self.host = host
        self._python = args.python
        self._options = args.ssh_option
        processes = args.nproc_per_node or host.processes or 1
        run = ["--nnodes", len(args.hosts), "--node-rank", rank, "--nproc-per-node", processes, "--tee", 3]
        run += ["--master-addr", args.master_addr or args.hosts[0].address, "--master-port", args.master_port]
        for option, value in given_network_options(args):
            run += [f"--{option.name}", value]
        # -u, because torchrun's --tee does not flush what it prints.
        argv = [args.python, "-u", "-c", _start("cli"), "run", *map(str, run), args.script, *args.arguments]
        variables = {"TORCHELASTIC_LOG_LINE_PREFIX_TEMPLATE": "[rank ${rank}] ", **dict(args.env)}
        self._job = json.dumps({"argv": argv, "variables": variables, "workdir": args.workdir})
        self._ssh: subprocess.Popen[bytes] | None = None
        self._printers: list[threading.Thread] = []

    def start(self) -> None:
        # ssh uses an option's first value, so the user's come first.
        options = [word for option in (*self._options, *_SSH_OPTIONS) for word in ("-o", option)]
        # A shell on the host reads this command: it is quoted, and holds no part of the job.
        command = f"exec {shlex.quote(self._python)} -u -c {shlex.quote(_start('node_agent'))}"
        self._ssh = subprocess.Popen(
            ["ssh", *options, "-p", str(self.host.port), "--", self.host.name, command],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,  # Ctrl-C must not reach ssh: we pass it on to the job
        )
        assert self._ssh.stdout is not None
        assert self._ssh.stderr is not None
        for source, target in ((self._ssh.stdout, sys.stdout), (self._ssh.stderr, sys.stderr)):
            printer = threading.Thread(target=self._print, args=(source, target), daemon=True)
            printer.start()
            self._printers.append(printer)
        self._write(self._job)

    def poll(self) -> int | None:
        """Returns the exit code of the job, None while it runs, or 0 if it was never started."""
        return self._ssh.poll() if self._ssh is not None else 0

    def send(self, number: signal.Signals) -> None:
        self._write(number.name)

    def hang_up(self) -> None:
        if self._ssh is not None and self._ssh.stdin is not None:
            with contextlib.suppress(OSError):
                self._ssh.stdin.close()

    def kill(self) -> None:
        if self._ssh is not None:
            self._ssh.kill()

    def finish(self) -> None:
        """Prints the rest of the output."""
        self.hang_up()
        for printer in self._printers:
            printer.join(_GRACE_SECONDS)

    def _write(self, line: str) -> None:
        if self._ssh is None or self._ssh.stdin is None or self._ssh.poll() is not None:
            return
        with contextlib.suppress(OSError, ValueError):  # ssh has ended, or its input is closed
            self._ssh.stdin.write(line.encode() + b"\n")
            self._ssh.stdin.flush()

    def _print(self, source: IO[bytes], target: IO[str]) -> None:
        for line in source:
            text = line.decode(errors="replace").rstrip("\n")
            target.write(f"[{self.host.name}] {text}\n")  # one write per line, so that hosts' lines do not mix
            target.flush()


def _start(module: str) -> str:
    """Returns code that runs a module's `main` without the working folder on Python's path.

    `python -m` would put it there, and a file such as json.py in the home folder would stand in for the standard library's.
    """
    return (
        "import sys; sys.path[:] = [path for path in sys.path if path]; "
        f"from lightning_accel.launch.{module} import main; sys.exit(main())"
    )


def _print_error(text: str) -> None:
    print(f"lightning-accel ssh-run: {text}", file=sys.stderr, flush=True)
