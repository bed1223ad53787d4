"""Joining the other processes, for programs without Lightning: who am I, how many are we, and what do I say."""

from __future__ import annotations

import logging
import random
import sys
from datetime import timedelta
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore, PrefixStore, Store, TCPStore
from torch.distributed.constants import default_pg_timeout

from lightning_accel.environment import Environment, detect, torchrun_attempt
from lightning_accel.transport.gloo import backend_of
from lightning_accel.transport.tcp_keepalive import open_sockets, watch_connections

if TYPE_CHECKING:
    import argparse

_log = logging.getLogger(__name__)

_joined: list[Environment] = []
"""What `init_process_group` found out, for as long as its group lives."""


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
    """Makes torch.distributed's default group of all processes. Collective.

    Who takes part comes from the arguments, or from the variables of torchrun, Open MPI, MPICH or SLURM; a process that
    none of them started is alone. On CUDA the process takes the device of its local rank.

    Args:
        backend: "nccl", "gloo" or another of torch.distributed; None takes nccl where there is a CUDA device, else gloo.
        seed: of the generators of Python, NumPy (if imported) and torch, the same on all ranks; None leaves them.
        timeout: of a collective.
        rank: as in `lightning_accel.environment.detect`, and so the following.
        world_size: number of processes.
        local_rank: on its node.
        local_world_size: number of processes on its node.
        host: where ranks meet: name or address of rank 0.
        port: of that.
        store: where ranks meet instead, the same for all; then `host` and `port` are not used.

    Returns:
        What was found out, and from where; print it when in doubt.

    Raises:
        ValueError: for missing or contradictory arguments or variables; names them.
        TypeError: for a timeout that is no timedelta.
        RuntimeError: if there is a default group already.

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
    if has_cuda and backend != "gloo":
        if found.local_rank >= torch.cuda.device_count():
            raise ValueError(
                f"local_rank {found.local_rank} ({found.sources['local_rank']}) needs a CUDA device of its own: "
                f"there are {torch.cuda.device_count()}; start fewer processes on this node"
            )
        torch.cuda.set_device(found.local_rank)
    if seed is not None:
        _seed_everything(seed)
    _log.info("%s", found)
    others = open_sockets()
    if store is None:
        store = _meet(found, timeout, at_agent=found.launcher == "torchrun" and host is None and port is None)
    dist.init_process_group(backend, store=store, rank=found.rank, world_size=found.world_size, timeout=timeout)
    assert dist.group.WORLD is not None
    if backend_of(dist.group.WORLD, torch.device("cpu")) == "gloo":
        # A rank that leaves at once would cut off those that still connect.
        try:
            dist.all_reduce(torch.zeros(1, device="cpu"))
        except BaseException:
            dist.destroy_process_group()
            raise
    watch_connections(others)
    _joined.append(found)
    return found


def destroy_process_group() -> None:
    """Ends the default group and all others; nothing if there is none. Unwrap models before."""
    _joined.clear()
    if dist.is_initialized():
        dist.destroy_process_group()


def get_rank() -> int:
    """This process's rank, 0 to `get_world_size() - 1`; known before `init_process_group` too."""
    return dist.get_rank() if dist.is_initialized() else _environment().rank


def get_world_size() -> int:
    """Number of processes."""
    return dist.get_world_size() if dist.is_initialized() else _environment().world_size


def get_local_rank() -> int:
    """This process's rank among those on its node."""
    return _environment().local_rank


def get_local_world_size() -> int:
    """Number of processes on this node."""
    return _environment().local_world_size


def get_node_rank() -> int:
    """This node's rank."""
    return _environment().node_rank


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds --backend, --rank, --world-size, --host and --port, the arguments of `init_process_group` with these names.

    Example:
        >>> import argparse
        >>> parser = argparse.ArgumentParser()
        >>> add_arguments(parser)
        >>> parsed = parser.parse_args(["--rank", "0", "--world-size", "1"])
        >>> init_process_group(  # doctest: +SKIP
        ...     parsed.backend, rank=parsed.rank, world_size=parsed.world_size, host=parsed.host, port=parsed.port
        ... )
    """
    group = parser.add_argument_group("processes", "default: from torchrun, Open MPI, MPICH or SLURM, else one process")
    group.add_argument("--backend", help="of torch.distributed (default: nccl with a CUDA device, else gloo)")
    group.add_argument("--rank", type=int, help="of this process; needs --world-size")
    group.add_argument("--world-size", type=int, help="number of processes; needs --rank")
    group.add_argument("--host", help="name or address of rank 0 (default: MASTER_ADDR, or what the launcher tells)")
    group.add_argument("--port", type=int, help="where ranks meet (default: MASTER_PORT, else 29500)")


def _check_backend(backend: str) -> None:
    """Before anybody waits for others; what torch says of a wrong name, it says after they have met."""
    for part in backend.lower().split(","):
        if part.rpartition(":")[2] not in dist.Backend.backend_list:
            known = ", ".join(dist.Backend.backend_list[1:])
            raise ValueError(f"backend must be one of {known}, or a list such as cpu:gloo,cuda:nccl: got {backend!r}")


def _meet(found: Environment, timeout: timedelta, *, at_agent: bool) -> Store:
    if found.world_size == 1:
        return HashStore()  # needs no port, which another process may have taken
    attempt = torchrun_attempt() if at_agent else None
    is_master = found.rank == 0 and attempt is None
    store = TCPStore(found.host, found.port, found.world_size, is_master=is_master, timeout=timeout)
    # The agent's store outlives the ranks, and with it the addresses of those that were killed.
    return store if attempt is None else PrefixStore(f"lightning_accel attempt {attempt}", store)


def _environment() -> Environment:
    return _joined[0] if _joined and dist.is_initialized() else detect()


def _seed_everything(seed: int) -> None:
    random.seed(seed)
    if (numpy := sys.modules.get("numpy")) is not None:
        numpy.random.seed(seed % 2**32)
    torch.manual_seed(seed)
