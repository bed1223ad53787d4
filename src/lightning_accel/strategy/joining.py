"""Joins the other ranks under Lightning, as `lightning_accel.init_process_group` does in a loop of one's own."""

from __future__ import annotations

import atexit
from typing import Any

import torch.distributed as dist
from torch.distributed.constants import default_pg_timeout

from lightning_accel.environment import torchrun_attempt
from lightning_accel.launch.joining import Rendezvous


def join(strategy: Any) -> None:
    """Makes the default process group, unless there is one. Collective.

    Lightning's own way finds no others after torchrun has started ranks again, and says nothing while it waits.

    Args:
        strategy: Either root's DDPStrategy, whose ranks are set.
    """
    if dist.is_initialized():
        return
    environment, backend, device = strategy.cluster_environment, strategy._get_process_group_backend(), strategy.root_device
    attempt = torchrun_attempt() if environment.creates_processes_externally else None
    place = environment.main_address, environment.main_port
    timeout = strategy._timeout or default_pg_timeout
    rendezvous = Rendezvous(environment.global_rank(), environment.world_size(), *place, timeout, attempt)
    rendezvous.join(backend, device if device.type == "cuda" else None)
    if backend == "nccl":
        atexit.register(_destroy)  # else torch warns of a group that was left


def _destroy() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
