"""The one door to the compiled kernels: how they are called, and the numbers they share with Python."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from lightning_accel import _native as kernels

__all__ = ["BLOCK_NUMEL", "DTYPES", "kernels", "run_kernel"]

BLOCK_NUMEL = kernels.BLOCK_NUMEL
"""Elements of a block, the unit in which parameters are dealt out to ranks."""

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
"""The dtypes that can be sent; the position is the native code."""


def run_kernel(kernel: Callable[..., None], device: torch.device, *operands: Any, on_cuda: int = True) -> None:
    """Calls a kernel, on CUDA on the current stream of `device`.

    Args:
        kernel: Function of `kernels` whose last two arguments say where it runs: on a GPU or not, and the stream.
        device: Device of the operands.
        *operands: The kernel's other arguments.
        on_cuda: What says "on a GPU". Kernels that follow a plan take the address of its table of segments.
    """
    if device.type == "cpu":
        kernel(*operands, 0, 0)
        return
    with torch.cuda.device(device):
        kernel(*operands, on_cuda, torch.cuda.current_stream(device).cuda_stream)
