"""Bagua's DistributedDataParallel, for scripts that wrap."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

import lightning_accel.algorithms
from lightning_accel.bagua.torch_api.algorithms.base import Algorithm, ours
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
    """DistributedDataParallel of torch with an algorithm attached (see `lightning_accel.wrap`). Collective.

    Args:
        module: on its device; its parameters, and the optimizers' states, become rank 0's.
        device_ids: as of torch's, and so the following; None takes the module's device.
        output_device: of torch's.
        dim: of torch's.
        broadcast_buffers: of torch's; Bagua takes it, and broadcasts none.
        process_group: whose ranks take part; None is the default group.
        bucket_cap_mb: of torch's; Bagua takes it, and does not look at it.
        find_unused_parameters: of torch's.
        check_reduction: of torch's, which does not look at it.
        gradient_as_bucket_view: of torch's.
        optimizers: over the parameters.
        algorithm: of `torch_api.algorithms`; or one of `lightning_accel`, or its name.

    Raises:
        TypeError: for an algorithm written for Bagua itself.
        ValueError: if QAdam's own optimizer is not among the optimizers.
    """
    optimizers = list(optimizers)
    made = ours(algorithm, optimizers)
    broadcast_optimizer_states(optimizers, process_group)
    of_ddp: dict[str, Any] = {"output_device": output_device, "dim": dim, "check_reduction": check_reduction}
    of_ddp |= {"broadcast_buffers": broadcast_buffers, "process_group": process_group, "bucket_cap_mb": bucket_cap_mb}
    of_ddp |= {"find_unused_parameters": find_unused_parameters, "gradient_as_bucket_view": gradient_as_bucket_view}
    if device_ids is not None:
        of_ddp["device_ids"] = device_ids
    return wrap(module, optimizers, made, **of_ddp)
