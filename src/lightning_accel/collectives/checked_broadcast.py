"""A broadcast of many tensors in one message, whose layout is compared before it is sent."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from itertools import accumulate

import torch

from lightning_accel.transport.gloo import is_staged
from lightning_accel.transport.group import Group

_ALIGNMENT = 16
"""Tensors begin at multiples of this, so that memory can be viewed as any dtype; it is also the header's size."""

_FIRST_BYTES = 4096
"""Size of the first part of each message, whatever it holds; buffers of a small model need no second one."""


class CheckedBroadcast:
    """The message that brings rank 0's values of some tensors to all ranks.

    gloo ends the process when a message is longer than its receiver expects. So the message comes in two parts: the first has a
    fixed size, and a header that tells the layout; the rest follows where that is the receiver's own. Over NCCL nothing is
    compared: it would make the host wait for the device.

    Args:
        tensors: Tensors of one device, of any dtypes and shapes.

    Attributes:
        message: The message, uint8, on the device of the tensors.
    """

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        self._layout = _layout_of(tensors)
        sizes = [tensor.numel() * tensor.element_size() for tensor in tensors]
        *starts, end = accumulate((-(-size // _ALIGNMENT) * _ALIGNMENT for size in sizes), initial=_ALIGNMENT)
        self.message = torch.zeros(max(end, _FIRST_BYTES), dtype=torch.uint8, device=tensors[0].device)
        self._views = [
            self.message[start : start + size].view(tensor.dtype).view(tensor.shape)
            for start, size, tensor in zip(starts, sizes, tensors, strict=True)
        ]
        self._header = [sum(sizes), zlib.crc32(repr(self._layout).encode())]
        self.message[:_ALIGNMENT].view(torch.int64).copy_(torch.tensor(self._header, dtype=torch.int64, device="cpu"))

    def fits(self, tensors: Sequence[torch.Tensor]) -> bool:
        """Returns whether tensors have the dtypes and shapes that this message was made for."""
        return self._layout == _layout_of(tensors)

    def gather(self, tensors: Sequence[torch.Tensor]) -> None:
        """Copies tensors into the message."""
        torch._foreach_copy_(self._views, list(tensors))

    def scatter(self, tensors: Sequence[torch.Tensor]) -> None:
        """Overwrites tensors with what the message holds."""
        torch._foreach_copy_(list(tensors), self._views)

    def send(self, group: Group) -> None:
        """Overwrites every rank's message with rank 0's. Collective.

        Raises:
            ValueError: Rank 0's message has another layout.
        """
        assert group.process_group is not None
        if self.message.is_cuda and not is_staged(group.process_group, self.message):
            group.broadcast(self.message)
            return
        group.broadcast(self.message[:_FIRST_BYTES])
        sent = self.message[:_ALIGNMENT].view(torch.int64).tolist()
        if sent != self._header:
            raise ValueError(
                f"rank 0 has {sent[0]} bytes of them, this rank {self._header[0]}"
                + (", of other shapes or dtypes" if sent[0] == self._header[0] else "")
            )
        group.broadcast(self.message[_FIRST_BYTES:])


def _layout_of(tensors: Sequence[torch.Tensor]) -> list[tuple[torch.dtype, torch.Size]]:
    return [(tensor.dtype, tensor.shape) for tensor in tensors]
