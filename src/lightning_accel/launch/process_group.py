"""Joins and leaves the process group of a program without Lightning, and tells its ranks and sizes."""

from __future__ import annotations

from datetime import timedelta

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import Store
from torch.distributed.constants import default_pg_timeout

from lightning_accel.environment import Environment, detect, torchrun_attempt, variable
from lightning_accel.launch.arguments import interfaces_problem
from lightning_accel.launch.joining import Rendezvous
from lightning_accel.launch.seeding import seed_everything
from lightning_accel.logs import get_log

_log = get_log(__name__)

_joined: list[Environment] = []
"""The environment that `init_process_group` detected, while its group lives."""


def init_process_group(
    backend: str | None = None,
    seed: int | None = None,
    timeout: timedelta = default_pg_timeout,
    *,
    rank: int | None = None,
    world_size: int | None = None,
    local_rank: int | None = None,
    local_world_size: int | None = None,
    host: str | None = None,
    port: int | None = None,
    store: Store | None = None,
) -> Environment:
    """Creates torch.distributed's default group of all processes. Collective.

    Ranks and sizes come from the arguments, or from the variables of torchrun, Open MPI, MPICH or SLURM; a process that none of
    them started is a group by itself. On CUDA the process takes the device of its local rank.

    Args:
        backend: "nccl", "gloo" or another backend of torch.distributed; None takes nccl with a CUDA device, else gloo.
        seed: Seed of the generators of Python, NumPy (if imported) and torch, the same on all ranks; None leaves them alone.
        timeout: Timeout of each collective, and of the wait for all ranks; after ten seconds the log says which are missing.
        rank: Rank of this process; like all arguments below, its default is that of `lightning_accel.environment.detect`.
        world_size: Number of processes.
        local_rank: Rank of this process on its node.
        local_world_size: Number of processes on its node.
        host: Name or address of the rendezvous host, which runs rank 0.
        port: Port of the rendezvous host.
        store: Store for the rendezvous, the same for all ranks; with it, `host` and `port` are ignored.

    Returns:
        The ranks, the sizes and the rendezvous address, each with its source; print it when in doubt.

    Raises:
        ValueError: An argument or variable is missing, or contradicts another; the message names it.
        TypeError: `timeout` is no timedelta.
        RuntimeError: torch.distributed has a default group already, or rank 0 cannot listen at its port.
        CommunicationError: Ranks were missing when the time was over.

    Example:
        >>> import lightning_accel as accel
        >>> accel.init_process_group()  # doctest: +SKIP
    """
    if dist.is_initialized():
        raise RuntimeError("torch.distributed has a default process group already; destroy_process_group() ends it")
    if backend is not None:
        _check_backend(backend)
    if not isinstance(timeout, timedelta):
        raise TypeError(f"timeout must be a datetime.timedelta, such as timedelta(minutes=5): got {timeout!r}")
    if store is not None:
        host = "the store given"
    found = detect(
        rank=rank, world_size=world_size, local_rank=local_rank, local_world_size=local_world_size, host=host, port=port
    )
    has_cuda = torch.cuda.is_available()
    backend = backend or ("nccl" if has_cuda else "gloo")
    interfaces = variable("GLOO_SOCKET_IFNAME")
    if interfaces and backend != "nccl" and (problem := interfaces_problem(interfaces)):
        raise ValueError(f"GLOO_SOCKET_IFNAME: {problem}")
    if has_cuda and backend != "gloo":
        if found.local_rank >= torch.cuda.device_count():
            raise ValueError(
                f"local_rank {found.local_rank} ({found.sources['local_rank']}) needs a CUDA device of its own: "
                f"there are {torch.cuda.device_count()}; start fewer processes on this node"
            )
        torch.cuda.set_device(found.local_rank)
    if seed is not None:
        seed_everything(seed)
    _log.info("%s", found)
    at_agent = found.launcher == "torchrun" and host is None and port is None
    attempt = torchrun_attempt() if at_agent else None
    Rendezvous(found.rank, found.world_size, found.host, found.port, timeout, attempt, store).join(backend)
    _joined.append(found)
    return found


def destroy_process_group() -> None:
    """Destroys the default group and all others, if there are any. Unwrap models first."""
    _joined.clear()
    if dist.is_initialized():
        dist.destroy_process_group()


def get_rank() -> int:
    """Returns the rank of this process, 0 to `get_world_size() - 1`; works before `init_process_group` too."""
    return dist.get_rank() if dist.is_initialized() else _environment().rank


def get_world_size() -> int:
    """Returns the number of processes."""
    return dist.get_world_size() if dist.is_initialized() else _environment().world_size


def get_local_rank() -> int:
    """Returns the rank of this process on its node."""
    return _environment().local_rank


def get_local_world_size() -> int:
    """Returns the number of processes on this node."""
    return _environment().local_world_size


def get_node_rank() -> int:
    """Returns the rank of this node."""
    return _environment().node_rank


def _check_backend(backend: str) -> None:
    """Refuses an unknown backend before any rank waits for others; torch would refuse it after the rendezvous."""
    for part in backend.lower().split(","):
        if part.rpartition(":")[2] not in dist.Backend.backend_list:
            known = ", ".join(dist.Backend.backend_list[1:])
            raise ValueError(f"backend must be one of {known}, or a list such as cpu:gloo,cuda:nccl: got {backend!r}")


def _environment() -> Environment:
    return _joined[0] if _joined and dist.is_initialized() else detect()
