"""Programs in processes of their own, as users start them; and ports that nobody else gets."""

import contextlib
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

_LAUNCHERS = ("SLURM_", "OMPI_", "PMI_", "PMIX_", "MPI_LOCAL", "TORCHELASTIC_", "PL_", "GLOO_", "BAGUA_")
_OTHERS = {"RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT"}
_OTHERS |= {"OMP_NUM_THREADS", "NCCL_SOCKET_IFNAME", "TORCH_DEVICE_BACKEND_AUTOLOAD", "FORCE_COLOR", "COLUMNS", "SSH_AUTH_SOCK"}
for _name in list(os.environ):  # tests that run inside of a job, or with somebody's own settings, are the same tests
    if _name.startswith(_LAUNCHERS) or _name in _OTHERS:
        del os.environ[_name]

ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path), "GLOO_SOCKET_IFNAME": "lo"}
"""The package where this process has it, whether it is installed or not."""


def run(*words: object, timeout: float = 100, variables: dict[str, str] | None = None, **options) -> subprocess.CompletedProcess:
    """Runs a program to its end; what it says is kept apart from what others say."""
    environment = {**ENVIRONMENT, **(variables or {})}
    pipes = {"capture_output": True, "text": True, "check": False, "timeout": timeout}
    return subprocess.run([str(word) for word in words], env=environment, **pipes, **options)


def start(*words: object, **options) -> subprocess.Popen:
    """Starts a program, whose output comes through pipes; whoever calls ends it."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([str(word) for word in words], **{"env": ENVIRONMENT, **pipes, **options})


@contextlib.contextmanager
def reserved_port() -> Iterator[int]:
    """A port for one listening program, which nobody else is given meanwhile.

    One that was found free and closed again may be anybody's by the time a program has imported torch. This one stays bound:
    the kernel gives it to no connection and to nobody who asks for any port, but whoever sets SO_REUSEADDR, as torch's
    stores and SLURM's daemons do, may listen at it.
    """
    with socket.socket() as held:
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        held.bind(("127.0.0.1", 0))
        yield held.getsockname()[1]


@contextlib.contextmanager
def agent_store() -> Iterator[int]:
    """The port of a store like that of torchrun's agent: it outlives the ranks of an attempt."""
    from torch.distributed import TCPStore

    with reserved_port() as port:
        store = TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
        yield port
        del store


def torchrun_variables(rank: int, world_size: int, port: int, attempt: int = 0) -> dict[str, str]:
    """What torchrun sets in the environment of a rank on a single node."""
    variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size, "GROUP_RANK": 0}
    variables |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "none"}
    variables |= {"TORCHELASTIC_USE_AGENT_STORE": True, "TORCHELASTIC_RESTART_COUNT": attempt}
    return {name: str(value) for name, value in variables.items()}


def is_alive(pid: int) -> bool:
    """Whether a process runs; one that has ended may wait for its parent still."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):  # it may go between opening and reading
        return False
