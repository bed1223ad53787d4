"""Bagua's DistributedDataParallel, for scripts that wrap."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

import lightning_accel.algorithms
from lightning_accel.bagua.torch_api.algorithms.base import Algorithm, unwrap_algorithm
from lightning_accel.bagua.torch_api.distributed import broadcast_optimizer_states
from lightning_accel.data_parallel.wrap import AccelDataParallel, wrap


def DistributedDataParallel(  # noqa: N802 - Bagua's name
    module: nn.Module,
    device_ids: Sequence[int | torch.device] | None = None,
    output_device: int | torch.device | None = None,
    dim: int = 0,
    broadcast_buffers: bool = True,
    process_group: dist.ProcessGroup | None = None,
    bucket_cap_mb: float = 25,
    find_unused_parameters: bool = False,
    check_reduction: bool = False,
    gradient_as_bucket_view: bool = True,
    optimizers: Sequence[torch.optim.Optimizer] = (),
    algorithm: Algorithm | lightning_accel.algorithms.Algorithm | str = "gradient_allreduce",
) -> AccelDataParallel:
    """Makes torch's DistributedDataParallel with an algorithm attached (see `lightning_accel.wrap`). Collective.

    Args:
        module: Module on its device; its parameters and the optimizers' states become rank 0's.
        device_ids: Torch's argument; None takes the module's device.
        output_device: Torch's argument.
        dim: Torch's argument.
        broadcast_buffers: Torch's argument; Bagua accepts it, and broadcasts none.
        process_group: Group whose ranks take part; None is the default group.
        bucket_cap_mb: Torch's argument; Bagua accepts and ignores it.
        find_unused_parameters: Torch's argument.
        check_reduction: Torch's argument, which torch ignores.
        gradient_as_bucket_view: Torch's argument.
        optimizers: Optimizers of the parameters.
        algorithm: Algorithm of `torch_api.algorithms`, or one of `lightning_accel`, or its name.

    Raises:
        TypeError: If the algorithm was written for Bagua itself.
        ValueError: If QAdam's own optimizer is not among the optimizers.
    """
    optimizers = list(optimizers)
    accel_algorithm = unwrap_algorithm(algorithm, optimizers)
    broadcast_optimizer_states(optimizers, process_group)
    ddp_kwargs: dict[str, Any] = {"output_device": output_device, "dim": dim, "check_reduction": check_reduction}
    ddp_kwargs |= {"broadcast_buffers": broadcast_buffers, "process_group": process_group, "bucket_cap_mb": bucket_cap_mb}
    ddp_kwargs |= {"find_unused_parameters": find_unused_parameters, "gradient_as_bucket_view": gradient_as_bucket_view}
    if device_ids is not None:
        ddp_kwargs["device_ids"] = device_ids
    return wrap(module, optimizers, accel_algorithm, **ddp_kwargs)
