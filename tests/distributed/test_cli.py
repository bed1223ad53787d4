"""The command `lightning-accel`, as users call it."""

import argparse
import contextlib
import io
import json
import re
import signal
import socket
import sys
from importlib.metadata import version

import pytest
import torch

import lightning_accel
from helpers import programs
from helpers.ranks import run_ranks
from helpers.tensors import CODECS
from lightning_accel import _native
from lightning_accel.algorithms import algorithm_names
from lightning_accel.launch import cli, report, self_test
from lightning_accel.launch.arguments import interface

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
    assert line.startswith(f"lightning-accel: Waiting for other nodes at 127.0.0.1:{port}: this is node {rank} of 2 (")


def test_env_says_who_this_process_is():
    """Catches a command that needs what it is to find out, and a machine that each of its processes describes once more."""
    variables = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "0"}
    done = command("env", **variables)
    assert (done.returncode, done.stdout[:47]) == (0, "started by torchrun: rank=1 (RANK), world_size=")
    assert done.stdout.count("\n") == 1
    done = command("env", **variables | {"RANK": "2"})
    assert done.returncode == 1
    assert done.stderr.startswith("lightning-accel env: rank must be")
    assert done.stderr.count("\n") == 1


def test_env_tells_what_training_finds_here(monkeypatch, capsys):
    """Catches a bug report that leaves out what is asked for first, and facts that JSON cannot hold."""
    monkeypatch.setenv("NCCL_DEBUG", "INFO")
    assert cli.main(["env", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["process"]["world_size"] == 1
    assert facts["versions"] | {"torch": version("torch"), "lightning-accel": lightning_accel.__version__} == facts["versions"]
    assert {"python", "lightning"} <= facts["versions"].keys()
    assert facts["kernels"]["instruction_set"] == _native.instruction_set()
    assert facts["kernels"]["cuda_architectures"] == _native.CUDA_ARCHITECTURES
    assert len(facts["gpus"]) == torch.cuda.device_count()
    assert "gloo" in facts["backends"]
    (loopback,) = [interface for interface in facts["interfaces"] if interface["name"] == "lo"]
    assert "127.0.0.1" in loopback["addresses"]
    assert facts["threads"]["torch"] == torch.get_num_threads()
    assert facts["variables"]["NCCL_DEBUG"] == "INFO"
    assert cli.main(["env"]) == 0
    told = capsys.readouterr().out
    for text in (version("torch"), _native.instruction_set(), "lo 127.0.0.1", "NCCL_DEBUG=INFO", "gloo"):
        assert text in told


FACTS = {
    "process": {"description": "started by hand"},
    "versions": {"torch": "2"},
    "kernels": {"instruction_set": "avx2", "instruction_sets": ["avx2"], "cuda_architectures": "86"},
    "gpus": [
        {"name": "A", "memory_gib": 24, "architecture": "86", "has_kernels": True},
        {"name": "B", "memory_gib": 80, "architecture": "90", "has_kernels": False},
    ],
    "backends": ["gloo", "nccl"],
    "interfaces": [
        {"name": "eth0", "addresses": ["10.0.0.1"], "state": "up", "speed_mbit_per_s": 25000},
        {"name": "eth1", "addresses": [], "state": "down", "speed_mbit_per_s": 100},
    ],
    "threads": {"cores": 4, "usable_cores": 2, "torch": 2, "torch_interop": 1},
    "variables": {},
}


def test_env_shows_gpus_without_kernels_and_speeds():
    """Catches what this machine has not: several GPUs, and cards that tell their speed."""
    told = report.render(FACTS)
    assert (
        "GPUs        A (24 GiB, architecture 86, has kernels)\n            B (80 GiB, architecture 90, WITHOUT kernels)\n" in told
    )
    assert "interfaces  eth0 10.0.0.1 up 25 Gbit/s\n            eth1 down 100 Mbit/s\n" in told
    assert "CUDA for 86\n" in told


def _test_myself(rank, world_size):
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        passed = self_test.main(["cpu"])
    whole = said.getvalue()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(said):
        correct = self_test.bytegrad.bytegrad
        patch.setattr(self_test, "CODECS", ("int8",))
        patch.setattr(self_test.bytegrad, "bytegrad", lambda *args, **options: [2 * g for g in correct(*args, **options)])
        failed = self_test.main(["cpu"])
    return passed, failed, whole, said.getvalue().removeprefix(whole)


def test_the_self_test_compares_everything_and_finds_a_difference():
    """Catches a self-test that leaves an algorithm or a codec out, and one that cannot fail."""
    (passed, failed, whole, broken), (also_passed, also_failed, *silence) = run_ranks(_test_myself, 2)
    assert passed == also_passed == 0, whole
    assert failed == also_failed == 1
    assert silence == ["", ""]
    for name in CODECS:
        assert re.search(rf"^codec +{name} .* ok +equal$", whole, re.MULTILINE)
        assert re.search(rf"^algorithm +bytegrad {name} +ok +equal$", whole, re.MULTILINE)
    for name in algorithm_names():
        assert re.search(rf"^algorithm +{name} .*ok ", whole, re.MULTILINE), name
    assert f"{len(whole.splitlines()) - 2} checks passed" in whole
    assert [line.split()[1:4] for line in broken.splitlines() if "DIFFERENT" in line] == [["bytegrad", "int8", "DIFFERENT"]]
    assert "1 of " in broken.splitlines()[-1]


def test_the_self_test_starts_processes_unless_there_are_some(monkeypatch, capsys):
    """Catches a test of one process, and one that starts processes for each process of a job."""
    got = []
    monkeypatch.setattr("torch.distributed.run.run", lambda args: got.append(args))
    monkeypatch.setattr(cli.threading.Thread, "start", lambda thread: None)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert cli.main(["test", "--device", "cpu"]) == cli.main(["test", "--device", "cpu", "--nproc-per-node", "3"]) == 0
    assert [args.nproc_per_node for args in got] == ["2", "3"]
    assert all(args.standalone and args.module and args.training_script == self_test.__name__ for args in got)
    monkeypatch.setattr(self_test, "main", lambda arguments: got.append(arguments) or 5)
    for name in ("RANK", "LOCAL_RANK", "GROUP_RANK"):
        monkeypatch.setenv(name, "0")
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.setenv(name, "1")
    assert cli.main(["test", "--device", "cpu"]) == 5
    assert got[-1] == ["cpu"]
    if not torch.cuda.is_available():
        assert cli.main(["test", "--device", "cuda"]) == 1
        assert "--device cuda needs a GPU" in capsys.readouterr().err


def test_an_interface_that_is_not_there_is_refused(monkeypatch):
    """Catches an error from inside gloo, on each rank, that does not say which interfaces there are."""
    assert interface("lo") == "lo"
    for text in ("eth99", "lo,eth99", "eth99,lo"):
        with pytest.raises(argparse.ArgumentTypeError, match=r"no interface 'eth99': it has .*\blo\b"):
            interface(text)
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth99")
    with pytest.raises(ValueError, match=r"GLOO_SOCKET_IFNAME: this machine has no interface 'eth99'"):
        lightning_accel.init_process_group("gloo")


@pytest.mark.parametrize(
    ("words", "code", "text"),
    [
        (["--help"], 0, "exit codes"),
        (["--version"], 0, f"lightning-accel {lightning_accel.__version__}\n"),
        (["test", "--help"], 0, "Exits with 1 if anything differs"),
        (["run", "--interface", "eth99", "x.py"], 2, "argument --interface: this machine has no interface 'eth99': it has"),
        (["ssh-run", "--host-list", "a", "--interface", "eth99"], 2, "the following arguments are required: script\n"),
        (["ssh-run", "--host-file", "/no/such/file", "x.py"], 2, "cannot read /no/such/file"),
        (["ssh-run", "x.py"], 2, "one of the arguments --host-list --host-file is required"),
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
