"""The four operations that move values between tensors and messages along a plan.

They check what Python knows (dtype, device, layout); the native side checks sizes again and releases the GIL. Tensors are
one-dimensional and contiguous, messages are `uint8`. On CUDA everything is enqueued on the current stream.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from lightning_accel.compression.error_feedback import Residuals, residual_addresses
from lightning_accel.compression.plan import Plan
from lightning_accel.native import kernels, run_kernel


def encode(plan: Plan, tensor: torch.Tensor, wire: torch.Tensor, residuals: Residuals | None = None) -> None:
    """Encodes `tensor` (`plan.dtype`) into `wire`, with error feedback if there are residuals. Padding keeps its bytes."""
    check_operands(tensor, plan.dtype, wire, "tensor")
    _run(kernels.encode, plan, tensor.device, *_memory(tensor), *_memory(wire), *residual_addresses(residuals, wire.device))


def decode(plan: Plan, wire: torch.Tensor, tensor: torch.Tensor) -> None:
    """Decodes `wire` into the plan's elements of `tensor` (`plan.dtype`)."""
    check_operands(tensor, plan.dtype, wire, "tensor")
    _run(kernels.decode, plan, tensor.device, *_memory(wire), *_memory(tensor))


def decode_accumulate(plan: Plan, wire: torch.Tensor, accumulator: torch.Tensor) -> None:
    """Adds the decoded values of `wire` to the plan's elements of `accumulator` (`plan.value_dtype`)."""
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
    """Decodes messages, sums them, divides the sum and encodes the result into `wire`, in one pass.

    Args:
        plan: Layout of each message; only its codec and sizes matter, not its place in a tensor.
        messages: `count` messages; their values are summed in this order, in `plan.value_dtype`.
        wire: Message that is overwritten with the encoded mean; it may lie in the place of one of the messages.
        count: Number of messages, at least 1.
        stride_bytes: Distance from the start of a message to the start of the next, a multiple of 16.
        divisor: Divisor of the sum.
        residuals: Residuals of error feedback, which are added to the mean; None turns error feedback off.
    """
    check_operands(messages, torch.uint8, wire, "messages")
    sources = (*_memory(messages), count, stride_bytes, divisor)
    _run(kernels.decode_sum_encode, plan, wire.device, *sources, *_memory(wire), *residual_addresses(residuals, wire.device))


def _run(kernel: Callable[..., None], plan: Plan, device: torch.device, *operands: float) -> None:
    run_kernel(kernel, device, plan.native, *operands, on_cuda=plan.segments_on(device))


def _memory(tensor: torch.Tensor) -> tuple[int, int]:
    return tensor.data_ptr(), tensor.numel()


def check_operands(tensor: torch.Tensor, dtype: torch.dtype, wire: torch.Tensor, name: str) -> None:
    """Raises ValueError unless native operations can use a message and a tensor of `dtype`, which errors call `name`."""
    if tensor.dtype != dtype or tensor.dim() != 1 or not tensor.is_contiguous():
        raise ValueError(
            f"{name} must be one-dimensional, contiguous, {dtype}: got {tensor.dtype} of shape {tuple(tensor.shape)}, "
            f"strides {tensor.stride()}"
        )
    if wire.dtype != torch.uint8 or wire.dim() != 1 or not wire.is_contiguous():
        raise ValueError(f"a message must be one-dimensional, contiguous, uint8: got {wire.dtype} of {tuple(wire.shape)}")
    if wire.device != tensor.device or tensor.device.type not in ("cpu", "cuda"):
        raise ValueError(f"{name} and message must lie on one CPU or CUDA device: got {tensor.device} and {wire.device}")
