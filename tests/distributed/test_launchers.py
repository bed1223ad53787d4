"""The example under launchers that are not torchrun, with their own daemons, all inside of this machine."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from helpers import programs
from helpers.hosts import DEVICE, two_hosts

EXAMPLE = Path(__file__).parents[2] / "examples" / "plain_pytorch.py"
STEP = EXAMPLE.with_name("steps") / "4_several_nodes.py"

SLURM_CONF = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmdPort={node_port}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
SlurmUser=root
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/pgid
TaskPlugin=task/none
MpiDefault=none
SelectType=select/linear
SchedulerType=sched/builtin
ReturnToService=2
NodeName={host} NodeAddr=127.0.0.1 CPUs={cores} State=UNKNOWN
PartitionName=all Nodes={host} Default=YES State=UP
"""


def slurm_program(name):
    return shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin")


@pytest.fixture
def slurm(tmp_path):
    """SLURM with this machine as its only node, for the time of a test; gives the path of its configuration."""
    names = ("munged", "slurmctld", "slurmd", "srun", "sinfo")
    missing = [name for name in names if slurm_program(name) is None]
    if missing or os.geteuid() != 0:
        pytest.skip(f"SLURM's daemons need root and {', '.join(missing or names)}")
    host = socket.gethostname().partition(".")[0]
    configuration = tmp_path / "slurm.conf"
    for name in ("state", "spool"):
        (tmp_path / name).mkdir()
    key = tmp_path / "munge.key"
    key.write_bytes(os.urandom(1024))
    key.chmod(0o400)
    munge = {"key-file": key, "socket": tmp_path / "munge.socket", "pid-file": tmp_path / "munged.pid"}
    munge |= {"log-file": tmp_path / "munged.log", "seed-file": tmp_path / "munged.seed"}
    commands = [
        ["munged", "--foreground", "--force", *(f"--{option}={path}" for option, path in munge.items())],
        ["slurmctld", "-D", "-f", configuration],
        ["slurmd", "-D", "-f", configuration],
    ]
    daemons = []

    def wait(is_there):
        deadline = time.monotonic() + 60
        while not is_there():
            said = "\n".join(path.read_text() for path in (*tmp_path.glob("*.log"), *tmp_path.glob("*.out")))
            if any(daemon.poll() is not None for daemon in daemons):
                pytest.skip(f"SLURM's daemons do not run here: {said}")
            assert time.monotonic() < deadline, f"SLURM's node did not become idle:\n{said}"
            time.sleep(0.1)

    with programs.reserved_port() as controller, programs.reserved_port() as node:
        ports = {"controller_port": controller, "node_port": node}
        configuration.write_text(SLURM_CONF.format(host=host, folder=tmp_path, cores=os.cpu_count(), **ports).lstrip())
        try:
            for name, *arguments in commands:
                with (tmp_path / f"{name}.out").open("w") as output:
                    words = [slurm_program(name), *map(str, arguments)]
                    daemons.append(subprocess.Popen(words, stdout=output, stderr=subprocess.STDOUT))
                wait(munge["socket"].exists)
            wait(lambda: "idle" in programs.run("sinfo", variables={"SLURM_CONF": str(configuration)}).stdout)
            yield configuration
        finally:
            for daemon in reversed(daemons):
                daemon.terminate()
            for daemon in reversed(daemons):
                try:
                    daemon.wait(10)
                except subprocess.TimeoutExpired:
                    daemon.kill()
                    daemon.wait()
            for process in steps_left(tmp_path):
                os.kill(process, signal.SIGKILL)


def steps_left(folder):
    """Processes that slurmd started for a job's step; on a busy machine they outlive it."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            is_step = process.joinpath("cmdline").read_bytes().startswith(b"slurmstepd")
            if is_step and any(str(link.readlink()).startswith(str(folder)) for link in process.joinpath("fd").iterdir()):
                found.append(int(process.name))
    return found


def check(done):
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("[rank 0] test accuracy") == 1, "two processes that know nothing of one another"
    assert "each rank sent 0.0 MB" not in done.stdout


def test_slurm_starts_the_example(slurm):
    """Catches variables that srun does not set, or sets otherwise than was read in its manual."""
    options = ("--ntasks=2", "--overcommit", "--export=ALL")
    check(programs.run("srun", *options, sys.executable, EXAMPLE, "--epochs", 2, variables={"SLURM_CONF": str(slurm)}))


@pytest.mark.skipif(shutil.which("mpirun") is None, reason="needs Open MPI's mpirun")
def test_open_mpi_starts_the_example(port):
    """Catches variables that mpirun does not set."""
    options = ("--allow-run-as-root", "--oversubscribe", "--bind-to", "none", "-n", "2")
    check(programs.run("mpirun", *options, sys.executable, EXAMPLE, "--epochs", 2, variables={"MASTER_PORT": str(port)}))


@pytest.fixture
def hosts():
    with two_hosts("10.78.0") as made:
        yield made


def start_on(hosts, *words):
    """The words under `lightning-accel run`, on each host."""
    nodes = []
    for rank, host in enumerate(hosts):
        options = ("--nnodes", 2, "--node-rank", rank, "--master-addr", hosts[0].address, "--interface", DEVICE)
        nodes.append(programs.start(*host.inside(sys.executable, "-m", "lightning_accel.launch.cli", "run", *options, *words)))
    return nodes


def test_torchrun_on_two_hosts_trains_the_example(hosts, tmp_path):
    """Catches ranks that meet at an address only one host can reach, and nodes that are taken for one."""
    files = ("--snapshot", tmp_path / "shared.pt", "--data", tmp_path / "data.pt")
    nodes = start_on(hosts, "--nproc-per-node", 2, STEP, "--epochs", 2, *files)
    try:
        results = [node.communicate(timeout=100) for node in nodes]
    finally:
        for node in nodes:
            node.kill()
            node.wait()
    for node, (_, errors) in zip(nodes, results, strict=True):
        assert node.returncode == 0, errors
    assert results[0][0].count("test accuracy") == 1
    assert "test accuracy" not in results[1][0]
    for rank, (output, _) in enumerate(results):
        assert f"local_world_size=2 (LOCAL_WORLD_SIZE), node_rank={rank} (GROUP_RANK), host={hosts[0].address}" in output
    assert (tmp_path / "shared.pt").exists()


TRAINS_ON = """
import torch
import lightning_accel as accel
from lightning_accel.transport import tcp_keepalive as connections

connections.UNREACHABLE_SECONDS = 2.0
accel.init_process_group()
model = torch.nn.Linear(100, 10)  # what is sent finds room at a busy peer, whose silence would count
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
with accel.wrap(model, optimizer, "bytegrad") as ddp:
    for step in range(10**9):
        optimizer.zero_grad()
        ddp(torch.randn(4, 100)).sum().backward()
        optimizer.step()
        if step == 20:
            print("training", flush=True)
"""


def test_a_host_that_is_unplugged_in_mid_run_ends_the_others(hosts, tmp_path):
    """Catches ranks that wait half an hour for one that cannot answer, and an error that does not say what to look for."""
    (tmp_path / "trains_on.py").write_text(TRAINS_ON)
    nodes = start_on(hosts, tmp_path / "trains_on.py")
    try:
        for node in nodes:
            assert node.stdout.readline() == "training\n"
        hosts[1].unplug()
        results = [node.communicate(timeout=100) for node in nodes]
    finally:
        for node in nodes:
            node.kill()
            node.wait()
    for rank, (node, (_, errors)) in enumerate(zip(nodes, results, strict=True)):
        assert node.returncode == 1, errors
        assert f"CommunicationError: bytegrad: bucket 0 failed on rank {rank} of 2" in errors
        assert "cannot be reached over the network" in errors
        assert f"lightning-accel run: rank {rank} failed first" in errors
