"""The one door to the compiled kernels: how they are called, and the numbers they share with Python."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch

from lightning_accel import _native as kernels

__all__ = ["BLOCK_NUMEL", "DTYPES", "kernels", "missing_kernels", "run_kernel", "runs_on"]

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


def missing_kernels(device: torch.device) -> str | None:
    """Says why no kernel can run on a device, and what to do about it; None if kernels can run there."""
    if device.type != "cuda":
        return None
    capability = torch.cuda.get_device_capability(device)
    built_for = kernels.CUDA_ARCHITECTURES
    if runs_on(built_for, capability):
        return None
    architecture = f"{capability[0]}{capability[1]}"
    has = f"CUDA kernels for {built_for}" if built_for else "no CUDA kernels: there was no nvcc or no GPU when it was built"
    options = f"-C cmake.define.ACCEL_CUDA=ON -C cmake.define.CMAKE_CUDA_ARCHITECTURES={architecture}"
    return (
        f"{device} ({torch.cuda.get_device_name(device)}, architecture {architecture}) needs CUDA kernels of its own, and this "
        f"install of lightning-accel has {has}. With nvcc on PATH, install it again from its source: "
        f"pip install --force-reinstall --no-deps . {options}"
    )


def runs_on(architectures: str, capability: tuple[int, int]) -> bool:
    """Whether kernels compiled for CMake's list of architectures run on a GPU of a compute capability.

    A binary runs on the same major version with the same or a later minor one; PTX, which "-real" leaves out, on all later ones.
    """
    if architectures in ("all", "all-major"):
        return capability >= (7, 5)
    for entry in filter(None, architectures.split(",")):
        parts = re.fullmatch(r"(\d+)(\d)([af]?)(-real|-virtual)?", entry)
        assert parts is not None, architectures
        major, minor = int(parts[1]), int(parts[2])
        if parts[3] and capability == (major, minor):
            return True
        if not parts[3] and parts[4] != "-virtual" and capability[0] == major and capability[1] >= minor:
            return True
        if not parts[3] and parts[4] != "-real" and capability >= (major, minor):
            return True
    return False
