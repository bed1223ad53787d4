"""How a native kernel is called that takes addresses alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from lightning_accel import _native


def run_kernel(kernel: Callable[..., None], device: torch.device, *operands: Any) -> None:
    """Calls a function of the native module with whether it shall run on a GPU, and the stream, as its last two arguments.

    On CUDA it is enqueued on the current stream of `device`.
    """
    if device.type == "cpu":
        kernel(*operands, False, 0)
        return
    with torch.cuda.device(device):
        kernel(*operands, True, torch.cuda.current_stream(device).cuda_stream)


BLOCK_NUMEL = _native.BLOCK_NUMEL
"""Elements that share one scale, and the unit in which parameters are dealt out to ranks."""


DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
"""Of tensors that can be sent; the position is the native code."""
