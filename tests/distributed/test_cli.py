"""The command `lightning-accel`, as users call it."""

import signal
import socket
import sys

import pytest

from helpers import programs
from lightning_accel.launch import cli

SCRIPT = """
import os, signal, sys
rank = os.environ["RANK"]
names = ("WORLD_SIZE", "GLOO_SOCKET_IFNAME", "OMP_NUM_THREADS")
line = f"{rank} {' '.join(os.environ[name] for name in names)} {sys.argv[1:]!r}\\n"
os.write(1, line.encode())  # at once: torchrun takes buffers from print, whose parts then mix with the other rank's
if sys.argv[1] == "exit" and rank == "1":
    sys.exit(7)
if sys.argv[1] == "kill" and rank == "1":
    os.kill(os.getpid(), signal.SIGKILL)
"""


def command(*words, **variables):
    return programs.run(sys.executable, "-m", "lightning_accel.launch.cli", *words, variables=variables)


def run(tmp_path, port, *words):
    script = tmp_path / "a script.py"
    script.write_text(SCRIPT)
    options = ("--nproc-per-node", "2", "--master-port", port, "--interface", "lo", "--omp-threads", "3")
    return command("run", *options, script, *words)


@pytest.mark.parametrize("words", [["--", "--x"], ["--"], ["--", "--", "x"], ["x", "--", "--x"], []])
@pytest.mark.parametrize("before", [["--nproc-per-node", "1"], ["--"]])
def test_a_scripts_arguments_may_begin_with_two_dashes(monkeypatch, before, words):
    """Catches a "--" that argparse takes for its own, in one of the commands."""
    got = []
    monkeypatch.setattr("torch.distributed.run.run", lambda args: got.append((args.training_script, args.training_script_args)))
    monkeypatch.setattr(cli.threading.Thread, "start", lambda thread: None)
    assert cli.main(["run", *before, "a.py", *words]) == 0
    monkeypatch.setattr(cli.ssh_run, "ssh_run", lambda args: got.append((args.script, args.arguments)))
    cli.main(["ssh-run", "--host-list", "one", *before, "a.py", *words])
    assert got == [("a.py", words)] * 2


def test_run_starts_ranks_with_the_arguments_and_the_network(tmp_path, port):
    """Catches words that a shell takes apart, and tuning that does not reach the processes."""
    words = ["ok", "--interface", "mine", "two words", "$(id)", "a;b", "'\"", "line\nbreak", "ü"]
    done = run(tmp_path, port, *words)
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.splitlines()) == [f"{rank} 2 lo 3 {words!r}" for rank in range(2)]
    for line in ("NCCL_SOCKET_IFNAME=lo", "GLOO_SOCKET_IFNAME=lo", "OMP_NUM_THREADS=3"):
        assert f"lightning-accel run: {line}\n" in done.stderr


@pytest.mark.parametrize(
    ("how", "code", "message"),
    [("exit", 7, "with exit code 7"), ("kill", 128 + signal.SIGKILL, f"with signal {signal.SIGKILL:d}")],
)
def test_run_returns_the_code_of_the_rank_that_failed_first(tmp_path, port, how, code, message):
    """Catches a failure that looks like success, or like the launcher's own."""
    done = run(tmp_path, port, how)
    assert done.returncode == code, done.stderr
    assert f"lightning-accel run: rank 1 failed first, {message}" in done.stderr


def test_a_port_that_is_taken_is_one_line(tmp_path):
    """Catches torchrun's traceback, and a failure that looks like the program's."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
        done = command("run", "--master-port", port, str(tmp_path / "x.py"))
    assert done.returncode == 1
    (line,) = [line for line in done.stderr.splitlines() if not line.startswith("[W")]  # c10d warns by itself
    assert line.startswith("lightning-accel run: the nodes did not meet: ")
    assert port in line
    assert "is it free?" in line


IMPATIENT = """
import sys
from lightning_accel.launch import cli
from lightning_accel.transport import long_waits

long_waits.FIRST_SECONDS = 0.5
sys.exit(cli.main(sys.argv[1:]))
"""


@pytest.mark.parametrize("rank", [0, 1])
def test_run_says_that_it_waits_for_other_nodes(tmp_path, port, rank):
    """Catches silence, for a quarter of an hour, when the command was not started on one of the nodes."""
    words = ("run", "--nnodes", 2, "--node-rank", rank, "--master-addr", "127.0.0.1", "--master-port", port, tmp_path / "x.py")
    node = programs.start(sys.executable, "-c", IMPATIENT, *words)
    try:
        line = next(line for line in node.stderr if "aiting" in line)
    finally:
        node.kill()
        node.communicate()
    assert line.startswith(f"lightning-accel run: Waiting for other nodes at 127.0.0.1:{port}: this is node {rank} of 2 (")


def test_env_says_who_this_process_is():
    """Catches a command that needs what it is to find out."""
    variables = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "0"}
    done = command("env", **variables)
    assert (done.returncode, done.stdout[:47]) == (0, "started by torchrun: rank=1 (RANK), world_size=")
    done = command("env", **variables | {"RANK": "2"})
    assert done.returncode == 1
    assert done.stderr.startswith("lightning-accel env: rank must be")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "code", "text"),
    [
        (["--help"], 0, "exit codes"),
        (["run", "--help"], 0, "--nccl-socket-threads"),
        (["env", "--help"], 0, "usage: lightning-accel env"),
        ([], 2, "the following arguments are required: COMMAND"),
        (["runn"], 2, "invalid choice: 'runn'"),
        (["run"], 2, "training_script"),
        (["run", "--omp-threads", "0", "x.py"], 2, "must be at least 1: got 0"),
        (["run", "--nproc-per-node", "0", "x.py"], 2, "argument --nproc-per-node: must be at least 1: got 0"),
        (["run", "--nproc-per-node", "gpus", "x.py"], 1, "lightning-accel run: Unsupported nproc_per_node value: gpus"),
        (["run", "--nnodes", "two", "x.py"], 2, "argument --nnodes: must be a number of nodes, or a range such as 2:4"),
        (["run", "--nnodes", "0", "x.py"], 2, "such as 2:4: got 0"),
        (["run", "--nnodes", "2:1", "x.py"], 2, "argument --nnodes: the minimum must not be above the maximum: got 2:1"),
        (["run", "--max-restarts", "-1", "x.py"], 2, "argument --max-restarts: must be at least 0: got -1"),
        (["run", "--master-port", "65536", "x.py"], 2, "argument --master-port: must be from 0 to 65535: got 65536"),
        (["run", "--interface", "", "x.py"], 2, "argument --interface: must not be empty"),
        (["run", "--nnodes", "2", "--node-rank", "2", "x.py"], 2, "must be at least 0 and below --nnodes 2: got 2"),
        (["ssh-run", "--help"], 0, "--nccl-sockets-per-thread"),
        (["ssh-run", "--host-list", "a"], 2, "the following arguments are required: script\n"),
        (["ssh-run", "--host-list", "a", "--master-port", "0", "x.py"], 2, "must be from 1 to 65535: got 0"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_help_and_usage(monkeypatch, capsys, words, code, text):
    """Catches a traceback where one line would do."""
    monkeypatch.setattr(cli.threading.Thread, "start", lambda thread: None)
    try:
        returned = cli.main(words)
    except SystemExit as end:
        returned = end.code
    said, errors = capsys.readouterr()
    assert returned == code
    assert text in said + errors
    assert code == 0 or len(errors.splitlines()) <= 2  # usage, and what was wrong
