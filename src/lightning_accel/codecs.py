"""What a block looks like on the wire: a thin, typed face of the native codecs.

A *plan* says which elements of a tensor stand where in a message; the four operations move between tensors and messages along
a plan. They check what Python knows (dtype, device, layout), the native side checks sizes again and releases the GIL. The wire
formats are shown byte by byte in native/README.md.

Tensors are one-dimensional and contiguous; messages are `uint8`. On CUDA everything is enqueued on the current stream.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from lightning_accel import _native

CODECS = ("none", "fp16", "bf16", "int8", "minmax_uint8", "int4", "sign")
"""Names of the codecs; the position is the native code."""

NEEDING_FEEDBACK = ("int4", "sign")
"""Codecs that lose so much that error feedback is their default."""

BLOCK_NUMEL = _native.BLOCK_NUMEL
"""Elements that share one scale, and the unit in which parameters are dealt out to ranks."""

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
"""Of tensors that can be sent; the position is the native code."""


def check_codec(name: str) -> None:
    """Raises ValueError unless `name` is a codec."""
    if name not in CODECS:
        close = difflib.get_close_matches(str(name), CODECS, n=1)
        nearest = f"; did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"codec must be one of {', '.join(CODECS)}: got {name!r}{nearest}")


def uses_feedback(codec: str, error_feedback: bool | None) -> bool:
    """Whether residuals are kept: as asked for, or the codec's default where that is None.

    Raises:
        ValueError: for what is neither True, False nor None, or True with codec "none", which loses nothing.
    """
    if error_feedback not in (True, False, None):
        raise ValueError(f"error_feedback must be True, False or None: got {error_feedback!r}")
    if error_feedback and codec == "none":
        raise ValueError("error_feedback=True needs a codec that loses something: 'none' does not")
    return codec in NEEDING_FEEDBACK if error_feedback is None else error_feedback


@dataclass(frozen=True)
class Residuals:
    """What codes lost of the values before, to be added to the next ones: error feedback.

    v = x + old, the message is v's code, and `updated` becomes v minus the message's value; where that is not finite, as in a
    block that is poisoned by NaN or Inf, `updated` becomes `old`.

    Attributes:
        old: float32, one-dimensional, indexed by the plan's residual offsets.
        updated: of the same kind; may be `old` itself.
    """

    old: torch.Tensor
    updated: torch.Tensor


class Plan:
    """Which elements of a tensor stand where in a message. Immutable.

    Args:
        codec: one of `CODECS`.
        dtype: of the tensor; float32, float16, bfloat16 or float64.
        tensor_offsets: first element of each segment in the tensor.
        numels: elements of each segment.
        wire_offsets: first byte of each segment in the message, ascending multiples of 16; None puts them one behind another.
        residual_offsets: first element of each segment among the residuals; None puts them as in the tensor.

    Raises:
        ValueError: for an unknown codec, a dtype that cannot be sent, or offsets that overlap.
    """

    def __init__(
        self,
        codec: str,
        dtype: torch.dtype,
        tensor_offsets: Sequence[int],
        numels: Sequence[int],
        wire_offsets: Sequence[int] | None = None,
        residual_offsets: Sequence[int] | None = None,
    ) -> None:
        check_codec(codec)
        if dtype not in DTYPES:
            raise ValueError(f"only {', '.join(str(d) for d in DTYPES)} can be sent: got {dtype}")
        self.codec = codec
        self.dtype = dtype
        self.native = _native.Plan(
            CODECS.index(codec),
            DTYPES.index(dtype),
            tensor_offsets,
            numels,
            [-1] * len(numels) if wire_offsets is None else wire_offsets,
            [] if residual_offsets is None else residual_offsets,
        )
        self.wire_bytes = self.native.wire_bytes
        """Bytes the message must have at least."""
        self.tensor_numel = self.native.tensor_numel
        """Elements the tensor must have at least."""
        self.residual_numel = self.native.residual_numel
        """Elements the residuals must have at least."""
        self._tables: dict[torch.device, torch.Tensor] = {}

    @cached_property
    def wire_offsets(self) -> list[int]:
        """First byte of each segment in the message."""
        return self.native.wire_offsets

    @property
    def value_dtype(self) -> torch.dtype:
        """What values are summed in: float32, but float64 where codec `none` carries float64."""
        return torch.float64 if self.codec == "none" and self.dtype == torch.float64 else torch.float32

    def _run(self, operation: Callable[..., None], device: torch.device, *operands: float) -> None:
        """Calls a native operation; on CUDA with the segment table and the current stream of `device`."""
        if device.type == "cpu":
            operation(self.native, *operands, 0, 0)
            return
        with torch.cuda.device(device):
            operation(self.native, *operands, self.segments_on(device), torch.cuda.current_stream(device).cuda_stream)

    def segments_on(self, device: torch.device) -> int:
        """Address of the segment table on a CUDA device, for native operations; it lives as long as the plan."""
        table = self._tables.get(device)
        if table is None:
            # Once a plan and device; a plan without segments still needs an address.
            data = bytearray(self.native.segment_table() or b"\0")
            table = self._tables[device] = torch.frombuffer(data, dtype=torch.uint8).to(device)
        return table.data_ptr()


def encode(plan: Plan, tensor: torch.Tensor, wire: torch.Tensor, residuals: Residuals | None = None) -> None:
    """Writes the code of `tensor` (`plan.dtype`) to `wire`, with error feedback if there are residuals.

    Padding keeps what it held.
    """
    check_operands(tensor, plan.dtype, wire, "tensor")
    plan._run(_native.encode, tensor.device, *_memory(tensor), *_memory(wire), *residual_addresses(residuals, wire.device))


def decode(plan: Plan, wire: torch.Tensor, tensor: torch.Tensor) -> None:
    """Writes the value of `wire` to the plan's elements of `tensor` (`plan.dtype`)."""
    check_operands(tensor, plan.dtype, wire, "tensor")
    plan._run(_native.decode, tensor.device, *_memory(wire), *_memory(tensor))


def decode_accumulate(plan: Plan, wire: torch.Tensor, accumulator: torch.Tensor) -> None:
    """Adds the value of `wire` to the plan's elements of `accumulator` (`plan.value_dtype`)."""
    check_operands(accumulator, plan.value_dtype, wire, "accumulator")
    plan._run(_native.decode_accumulate, accumulator.device, *_memory(wire), *_memory(accumulator))


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
    plan._run(_native.decode_sum_encode, wire.device, *of_messages, *_memory(wire), *residual_addresses(residuals, wire.device))


def _memory(tensor: torch.Tensor) -> tuple[int, int]:
    return tensor.data_ptr(), tensor.numel()


def residual_addresses(residuals: Residuals | None, device: torch.device) -> tuple[int, int, int]:
    """Addresses of the old and the updated residuals and how many there are, for native operations; 0 for none.

    Raises:
        ValueError: for residuals of another kind, or on another device.
    """
    if residuals is None:
        return 0, 0, 0
    for name, memory in (("old", residuals.old), ("updated", residuals.updated)):
        if memory.dtype != torch.float32 or memory.dim() != 1 or not memory.is_contiguous() or memory.device != device:
            raise ValueError(
                f"residuals must be one-dimensional, contiguous, float32 on {device}: `{name}` is {memory.dtype} of shape "
                f"{tuple(memory.shape)} on {memory.device}"
            )
    numel = min(residuals.old.numel(), residuals.updated.numel())
    return residuals.old.data_ptr(), residuals.updated.data_ptr(), numel


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
