"""Refuses a GPU that the install has no kernels for, when a model is set up and not in the first bucket."""

from __future__ import annotations

import torch
import torch.distributed as dist

from lightning_accel.algorithms.base import Algorithm
from lightning_accel.native import missing_kernels
from lightning_accel.transport.topology import Topology


def check_kernels(algorithm: Algorithm, topology: Topology, process_group: dist.ProcessGroup, device: torch.device) -> None:
    """Refuses devices without kernels, on all ranks alike: installs and GPUs may differ between nodes. Collective.

    Raises:
        RuntimeError: If the algorithm needs kernels that are not there for the device of any rank.
    """
    if device.type == "cpu" or not algorithm.needs_kernels(topology):
        return
    problems: list[str | None] = [None] * dist.get_world_size(process_group)
    dist.all_gather_object(problems, missing_kernels(device), group=process_group)
    for rank, problem in enumerate(problems):
        if problem is not None:
            raise RuntimeError(
                f"{algorithm.name}: on rank {rank}, {problem}. Or use algorithm 'gradient_allreduce' (flat), which needs none"
            )
