"""Refuses models that differ between ranks before DDP is made: its broadcasts of unequal sizes would end the process."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch.distributed as dist
from torch import nn

from lightning_accel.collectives import comparison


def check_same_model(name: str, module: nn.Module, ddp_kwargs: Mapping[str, Any]) -> None:
    """Compares what DDP's constructor takes for equal on all ranks of its process group. Collective.

    Compared are names, order, dtypes and shapes of parameters, which of them need a gradient, and buffers if DDP broadcasts them;
    with `init_sync=False`, which broadcasts nothing, the parameters' values too. What DDP is told to ignore is not compared.

    Args:
        name: Name of the algorithm, for messages.
        module: Module that is to be wrapped.
        ddp_kwargs: Arguments of DistributedDataParallel.

    Raises:
        ValueError: If something differs, with its name and the ranks; the same on all ranks.
    """
    if not dist.is_initialized():
        return  # DDP says so
    group = _process_group(ddp_kwargs)
    ignored = getattr(module, "_ddp_params_and_buffers_to_ignore", ())
    weights = {f"parameter {key!r}": weight for key, weight in module.named_parameters() if key not in ignored}
    layout = {
        key: f"{comparison.describe(weight)}, {'trainable' if weight.requires_grad else 'frozen'}"
        for key, weight in weights.items()
    }
    if ddp_kwargs.get("forward_sync_buffers") is not None or ddp_kwargs.get("broadcast_buffers", True):
        buffers = {key: buffer for key, buffer in module.named_buffers() if key not in ignored}
        layout |= {f"buffer {key!r}": comparison.describe(buffer) for key, buffer in buffers.items()}

    def gather(message: bytes) -> Sequence[bytes]:
        messages = [message] * dist.get_world_size(group)
        dist.all_gather_object(messages, message, group=group)
        return messages

    comparison.check_layouts(layout, gather, name)
    if ddp_kwargs.get("init_sync", True):
        return
    held = {key: weight for key, weight in weights.items() if comparison.is_dense(weight) and not weight.is_meta}
    if different := list(comparison.differing(held, gather)):
        raise ValueError(
            f"{name} needs equal weights on all ranks, which init_sync=False leaves to you: {different[0]} (one of "
            f"{len(different)}) is not equal. Leave init_sync at True, and all ranks get rank 0's weights"
        )


def _process_group(ddp_kwargs: Mapping[str, Any]) -> dist.ProcessGroup | None:
    mesh = ddp_kwargs.get("device_mesh")
    group: dist.ProcessGroup | None = mesh.get_group(0) if mesh is not None else ddp_kwargs.get("process_group")
    return group
