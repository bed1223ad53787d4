"""Encoding and decoding along a plan."""

from __future__ import annotations

from collections.abc import Callable

import torch

from lightning_accel.compression.error_feedback import Residuals, residual_addresses
from lightning_accel.compression.plan import Plan
from lightning_accel.native import kernels, run_kernel


def encode(plan: Plan, tensor: torch.Tensor, wire: torch.Tensor, residuals: Residuals | None = None) -> None:
    """Writes the code of `tensor` (`plan.dtype`) to `wire`, with error feedback if there are residuals.

    Padding keeps what it held.
    """
    check_operands(tensor, plan.dtype, wire, "tensor")
    _run(kernels.encode, plan, tensor.device, *_memory(tensor), *_memory(wire), *residual_addresses(residuals, wire.device))


def decode(plan: Plan, wire: torch.Tensor, tensor: torch.Tensor) -> None:
    """Writes the value of `wire` to the plan's elements of `tensor` (`plan.dtype`)."""
    check_operands(tensor, plan.dtype, wire, "tensor")
    _run(kernels.decode, plan, tensor.device, *_memory(wire), *_memory(tensor))


def decode_accumulate(plan: Plan, wire: torch.Tensor, accumulator: torch.Tensor) -> None:
    """Adds the value of `wire` to the plan's elements of `accumulator` (`plan.value_dtype`)."""
    check_operands(accumulator, plan.value_dtype, wire, "accumulator")
    _run(kernels.decode_accumulate, plan, accumulator.device, *_memory(wire), *_memory(accumulator))


def decode_sum_encode(
    plan: Plan,
    messages: torch.Tensor,
    wire: torch.Tensor,
    *,
    count: int,
    stride_bytes: int,
    divisor: float,
    residuals: Residuals | None = None,
) -> None:
    """Writes the code of the messages' mean to `wire`, in one pass.

    Args:
        plan: layout of each message; only its codec and sizes matter, not its place in a tensor.
        messages: `count` messages, `stride_bytes` (a multiple of 16) apart; values are summed in their order, in
            `plan.value_dtype`.
        wire: overwritten with the code of the sum divided by `divisor`; may be the place of one of the messages.
        count: number of messages, at least 1.
        stride_bytes: from the start of a message to the start of the next.
        divisor: what the sum is divided by.
        residuals: for error feedback: added to the mean.
    """
    check_operands(messages, torch.uint8, wire, "messages")
    of_messages = (*_memory(messages), count, stride_bytes, divisor)
    _run(kernels.decode_sum_encode, plan, wire.device, *of_messages, *_memory(wire), *residual_addresses(residuals, wire.device))


def _run(kernel: Callable[..., None], plan: Plan, device: torch.device, *operands: float) -> None:
    run_kernel(kernel, device, plan.native, *operands, on_cuda=plan.segments_on(device))


def _memory(tensor: torch.Tensor) -> tuple[int, int]:
    return tensor.data_ptr(), tensor.numel()


def check_operands(tensor: torch.Tensor, dtype: torch.dtype, wire: torch.Tensor, name: str) -> None:
    """Raises ValueError unless a native operation can use a tensor of `dtype`, called `name`, and a message."""
    if tensor.dtype != dtype or tensor.dim() != 1 or not tensor.is_contiguous():
        raise ValueError(
            f"{name} must be one-dimensional, contiguous, {dtype}: got {tensor.dtype} of shape {tuple(tensor.shape)}, "
            f"strides {tensor.stride()}"
        )
    if wire.dtype != torch.uint8 or wire.dim() != 1 or not wire.is_contiguous():
        raise ValueError(f"a message must be one-dimensional, contiguous, uint8: got {wire.dtype} of {tuple(wire.shape)}")
    if wire.device != tensor.device or tensor.device.type not in ("cpu", "cuda"):
        raise ValueError(f"{name} and message must lie on one CPU or CUDA device: got {tensor.device} and {wire.device}")
