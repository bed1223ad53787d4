"""Plans: which elements of a tensor stand where in a message."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch

from lightning_accel.compression.codecs import CODECS, check_codec
from lightning_accel.native import DTYPES, kernels


class Plan:
    """Tells which elements of a tensor stand where in a message. Immutable.

    Args:
        codec: Name of a codec, from `CODECS`.
        dtype: Dtype of the tensor: float32, float16, bfloat16 or float64.
        tensor_offsets: First element of each segment in the tensor.
        numels: Number of elements of each segment.
        wire_offsets: First byte of each segment in the message, ascending multiples of 16; None packs segments one after another.
        residual_offsets: First element of each segment among the residuals; None takes the offsets in the tensor.

    Raises:
        ValueError: The codec is unknown, the dtype cannot be sent, or segments overlap.
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
        """Smallest size of a message in bytes."""
        self.tensor_numel = self.native.tensor_numel
        """Smallest number of elements of a tensor."""
        self.residual_numel = self.native.residual_numel
        """Smallest number of elements of the residuals."""
        self._tables: dict[torch.device, torch.Tensor] = {}

    @cached_property
    def wire_offsets(self) -> list[int]:
        """First byte of each segment in the message."""
        return self.native.wire_offsets

    @property
    def value_dtype(self) -> torch.dtype:
        """Dtype in which values are summed: float64 if codec `none` carries float64, else float32."""
        return torch.float64 if self.codec == "none" and self.dtype == torch.float64 else torch.float32

    def segments_on(self, device: torch.device) -> int:
        """Returns the address of the segment table on a CUDA device, which lives as long as the plan; 0 on the CPU."""
        if device.type == "cpu":
            return 0
        table = self._tables.get(device)
        if table is None:
            # Made once per plan and device; a plan without segments still needs an address.
            data = bytearray(self.native.segment_table() or b"\0")
            table = self._tables[device] = torch.frombuffer(data, dtype=torch.uint8).to(device)
        return table.data_ptr()
