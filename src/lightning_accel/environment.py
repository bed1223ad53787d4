"""Detects rank, world size and node of this process from arguments or a launcher's variables. The only reader of os.environ."""

from __future__ import annotations

import operator
import os
import re
import socket
from collections.abc import Mapping
from dataclasses import dataclass, field

DEFAULT_PORT = 29500
"""Port of the rendezvous host, as in torchrun."""


def node_name() -> str:
    """Returns a name that all processes on this machine share, and no others.

    The name comes from torchrun's GROUP_RANK or Lightning's NODE_RANK if one is set, because several hosts may carry the same
    name, else from the host.
    """
    for variable in ("GROUP_RANK", "NODE_RANK"):
        if value := os.environ.get(variable):
            return f"{variable}={value}"
    return socket.gethostname()


def variable(name: str) -> str | None:
    """Returns the value of an environment variable, or None if it is not set."""
    return os.environ.get(name)


_TRAINING_VARIABLES = re.compile(
    "(NCCL|GLOO|TORCH|TORCHELASTIC|OMP|MKL|CUDA|LIGHTNING_ACCEL|PL|SLURM_STEP|OMPI_COMM_WORLD|PMI|MASTER)_.*"
    "|RANK|WORLD_SIZE|LOCAL_RANK|LOCAL_WORLD_SIZE|GROUP_RANK|NODE_RANK"
)


def training_variables() -> dict[str, str]:
    """Returns the environment variables that training, its launchers and its libraries look at."""
    return {name: value for name, value in sorted(os.environ.items()) if _TRAINING_VARIABLES.fullmatch(name)}


def torchrun_attempt() -> str | None:
    """Returns the number of torchrun's attempt, from "0" on, if torchrun's agent hosts the rendezvous store, else None."""
    return os.environ.get("TORCHELASTIC_RESTART_COUNT") if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" else None


@dataclass(frozen=True)
class Environment:
    """This process among all processes.

    Attributes:
        launcher: Source of the ranks: "arguments", "torchrun", "Open MPI", "MPICH", "SLURM" or "single process".
        rank: Rank of the process.
        world_size: Number of processes.
        local_rank: Rank of the process on its node.
        local_world_size: Number of processes on its node.
        node_rank: Rank of its node.
        host: Name or address of the rendezvous host, which runs rank 0.
        port: Port of the rendezvous host.
        sources: Argument or variable that each of the values above comes from.
    """

    launcher: str
    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    node_rank: int
    host: str
    port: int
    sources: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        facts = (f"{name}={getattr(self, name)} ({source})" for name, source in self.sources.items())
        return f"started by {self.launcher}: " + ", ".join(facts)


@dataclass(frozen=True)
class _Launcher:
    """Names of a launcher's variables; an empty name means that the launcher has no such variable.

    If the variable `mark`, by default the rank's, is set, the launcher started this process, and the others must be set too.
    """

    name: str
    rank: str
    world_size: str
    local_rank: str
    local_world_size: str = ""
    node_rank: str = ""
    mark: str = ""


# Innermost first: torchrun and mpirun also run inside SLURM jobs. SLURM may set PMI_RANK too, so MPICH is recognised by its own
# variable. For SLURM only variables of srun count: the shell of a job has a rank too, but is not one of the tasks.
_LAUNCHERS = (
    _Launcher("torchrun", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK"),
    _Launcher(
        "Open MPI", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"
    ),
    _Launcher("MPICH", "PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS", mark="MPI_LOCALRANKID"),
    _Launcher(
        "SLURM", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", node_rank="SLURM_NODEID", mark="SLURM_STEP_NUM_TASKS"
    ),
)


def detect(
    *,
    rank: int | None = None,
    world_size: int | None = None,
    local_rank: int | None = None,
    local_world_size: int | None = None,
    host: str | None = None,
    port: int | None = None,
    variables: Mapping[str, str] | None = None,
) -> Environment:
    """Detects this process's ranks and sizes, from arguments if they are given, else from its launcher's variables.

    Args:
        rank: Rank of the process; it needs `world_size`, and no launcher's ranks are read then.
        world_size: Number of processes; it needs `rank`.
        local_rank: Rank on its node; the default is the launcher's, or `rank` if that is given.
        local_world_size: Number of processes on its node; the default is the launcher's, or `world_size` if that is given.
        host: Name or address of the rendezvous host; the default is MASTER_ADDR, else what the launcher's variables tell.
        port: Port of the rendezvous host; the default is MASTER_PORT, else a port derived from SLURM's job, else 29500.
        variables: Environment variables; None reads os.environ.

    Raises:
        ValueError: An argument or variable is missing, malformed, or contradicts another; the message names it.
    """
    env = os.environ if variables is None else variables
    known: dict[str, tuple[int, str]] = {}
    rank, world_size = _to_int("rank", rank), _to_int("world_size", world_size)
    local = {"local_rank": _to_int("local_rank", local_rank), "local_world_size": _to_int("local_world_size", local_world_size)}
    port = _to_int("port", port)
    known.update({name: (value, "argument") for name, value in local.items() if value is not None})
    if rank is not None or world_size is not None:
        launcher = "arguments"
        for name, value in (("rank", rank), ("world_size", world_size)):
            if value is None:
                raise ValueError(f"rank and world_size belong together: {name} is missing")
            known[name] = value, "argument"
        known.setdefault("local_rank", (known["rank"][0], "rank"))
        known.setdefault("local_world_size", (known["world_size"][0], "world_size"))
    else:
        launcher = _read_launcher(env, known)
    known.setdefault("node_rank", _node_rank_of(known))
    _check(known)

    sources = {name: source for name, (_, source) in known.items()}
    is_local = known["local_world_size"][0] == known["world_size"][0]
    host, sources["host"] = _find_host(host, env, launcher, is_local)
    port, sources["port"] = _find_port(port, env, launcher)
    if known["world_size"][0] > 1 and not 1 <= port <= 65535:  # a single process meets nobody
        raise ValueError(f"port must be from 1 to 65535: got {port} ({sources['port']})")
    return Environment(launcher, **{name: value for name, (value, _) in known.items()}, host=host, port=port, sources=sources)


def _read_launcher(env: Mapping[str, str], known: dict[str, tuple[int, str]]) -> str:
    """Adds ranks and sizes that `known` lacks, from the launcher's variables; returns the launcher's name."""
    for launcher in _LAUNCHERS:
        if (launcher.mark or launcher.rank) not in env:
            continue
        for name in ("rank", "world_size", "local_rank", "local_world_size", "node_rank"):
            variable = getattr(launcher, name)
            if not variable or name in known or (name == "node_rank" and variable not in env):
                continue
            known[name] = _number(env, variable, launcher.name), variable
        if "local_world_size" not in known:
            variable = "SLURM_STEP_TASKS_PER_NODE"
            counts = _expand_counts(_text(env, variable, launcher.name))
            node = known.get("node_rank", (0, ""))[0]
            known["local_world_size"] = counts[min(node, len(counts) - 1)], variable
        return launcher.name
    if "WORLD_SIZE" in env and env["WORLD_SIZE"] != "1":
        raise ValueError(
            f"WORLD_SIZE is {env['WORLD_SIZE']}, but RANK is not set: start with torchrun, or set RANK too. Lightning's "
            "Trainer and Fabric have launchers of their own: with them, ask the Trainer or Fabric for ranks"
        )
    for name, value in (("rank", 0), ("world_size", 1), ("local_rank", 0), ("local_world_size", 1)):
        known.setdefault(name, (value, "no launcher's variables"))
    return "single process"


def _node_rank_of(known: dict[str, tuple[int, str]]) -> tuple[int, str]:
    """Derives the node's rank, assuming that each node has equally many consecutive ranks."""
    return known["rank"][0] // max(known["local_world_size"][0], 1), "rank"


def _to_int(name: str, value: object) -> int | None:
    """Converts an integer of any type, such as NumPy's, to int."""
    if value is None:
        return None
    try:
        if not isinstance(value, bool):
            return operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        pass
    raise ValueError(f"{name} must be a whole number: got {value!r}")


def _check(known: dict[str, tuple[int, str]]) -> None:
    for index, count in (("rank", "world_size"), ("local_rank", "local_world_size")):
        (value, source), (limit, limit_source) = known[index], known[count]
        if not 0 <= value < limit:
            raise ValueError(f"{index} must be at least 0 and below {count} {limit} ({limit_source}): got {value} ({source})")
    node, source = known["node_rank"]
    if node < 0:
        raise ValueError(f"node_rank must be at least 0: got {node} ({source})")
    (local, source), (total, _) = known["local_world_size"], known["world_size"]
    if local > total:
        raise ValueError(f"local_world_size must be at most world_size {total}: got {local} ({source})")


def _find_host(host: str | None, env: Mapping[str, str], launcher: str, is_local: bool) -> tuple[str, str]:
    if host is not None:
        return host, "argument"
    if value := env.get("MASTER_ADDR"):
        return value, "MASTER_ADDR"
    if launcher == "SLURM":
        return _first_host(_text(env, "SLURM_STEP_NODELIST", launcher)), "SLURM_STEP_NODELIST"
    if is_local:
        return "127.0.0.1", "all ranks are on this node"
    raise ValueError(
        f"MASTER_ADDR is not set, and {launcher} does not tell where rank 0 runs: give host, or set MASTER_ADDR on all ranks"
    )


def _find_port(port: int | None, env: Mapping[str, str], launcher: str) -> tuple[int, str]:
    if port is not None:
        return port, "argument"
    if env.get("MASTER_PORT"):
        return _number(env, "MASTER_PORT", launcher), "MASTER_PORT"
    if launcher == "SLURM":
        # Jobs that share a node need different ports.
        return 15000 + _number(env, "SLURM_JOB_ID", launcher) % 10000, "SLURM_JOB_ID"
    return DEFAULT_PORT, "default"


def _text(env: Mapping[str, str], variable: str, launcher: str) -> str:
    if not (value := env.get(variable)):
        remedy = "; give local_rank and local_world_size" if variable.startswith("LOCAL_") else ""
        raise ValueError(f"{variable} is not set, but other variables of {launcher} are{remedy}")
    return value


def _number(env: Mapping[str, str], variable: str, launcher: str) -> int:
    value = _text(env, variable, launcher)
    if not re.fullmatch(r"-?\d+", value, re.ASCII):
        raise ValueError(f"{variable} must be a whole number: got {value!r}")
    return int(value)


def _expand_counts(text: str) -> list[int]:
    """Expands SLURM's notation of one count per node: "2(x3),1" is 2, 2, 2, 1."""
    counts = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part, re.ASCII)
        if match is None:
            raise ValueError(f"SLURM_STEP_TASKS_PER_NODE must be like 2(x3),1: got {text!r}")
        counts += [int(match[1])] * int(match[2] or 1)
    return counts


def _first_host(text: str) -> str:
    """Returns the first host of SLURM's list: "gpu[07-09,12],cpu1" begins with gpu07."""
    match = re.fullmatch(r"([^\[\],]+)(?:\[(\d+)[^\]]*\])?([^\[\],]*)(?:,.*)?", text)
    if match is None:
        raise ValueError(f"SLURM_STEP_NODELIST must be like gpu[07-09],cpu1: got {text!r}")
    return match[1] + (match[2] or "") + match[3]
