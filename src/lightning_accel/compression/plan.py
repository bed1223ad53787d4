"""Which elements of a tensor stand where in a message."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch

from lightning_accel.compression.codecs import CODECS, check_codec
from lightning_accel.native import DTYPES, kernels


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
        self.native = kernels.Plan(
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

    def segments_on(self, device: torch.device) -> int:
        """Returns the address of the segment table on a CUDA device, which lives as long as the plan; 0 on the CPU."""
        if device.type == "cpu":
            return 0
        table = self._tables.get(device)
        if table is None:
            # Once a plan and device; a plan without segments still needs an address.
            data = bytearray(self.native.segment_table() or b"\0")
            table = self._tables[device] = torch.frombuffer(data, dtype=torch.uint8).to(device)
        return table.data_ptr()
