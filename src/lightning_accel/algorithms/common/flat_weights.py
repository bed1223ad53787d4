"""Weights as flat buffers, one for each dtype, as algorithms that exchange weights send them."""

from __future__ import annotations

from collections.abc import Sequence

import torch


class FlatWeights:
    """Copies tensors to flat buffers and back, by one multi-tensor operation for each dtype.

    A buffer holds the tensors of one dtype one behind another, each in the order of its elements, whatever its memory format.
    Only the constructor and `allocate` allocate memory.

    Args:
        tensors: Weights of a replica in the order of `named_parameters`, or its buffers; one that is given twice counts once.
        widen: Whether the float32 buffer holds float16 and bfloat16 tensors too.
        device: Device of the buffers; None takes that of the first tensor of each.

    Attributes:
        dtypes: Dtypes of the buffers, in the order in which they first occur.
        numels: Number of elements of each buffer, without padding.
        parts: For each buffer, the number of elements of each tensor in it.
    """

    def __init__(self, tensors: Sequence[torch.Tensor], *, widen: bool = False, device: torch.device | None = None) -> None:
        halves = (torch.float16, torch.bfloat16) if widen else ()
        groups: dict[torch.dtype, list[torch.Tensor]] = {}
        for tensor in {id(tensor): tensor for tensor in tensors}.values():
            groups.setdefault(torch.float32 if tensor.dtype in halves else tensor.dtype, []).append(tensor)
        self.dtypes = list(groups)
        self._tensors = list(groups.values())
        self.parts = [[tensor.numel() for tensor in group] for group in self._tensors]
        self.numels = [sum(part) for part in self.parts]
        self._device = device
        self._views: dict[int, list[torch.Tensor]] = {}

    def allocate(self, multiple: int = 1) -> list[torch.Tensor]:
        """Makes a buffer of zeros for each dtype, padded to a multiple of `multiple` elements.

        This object keeps views into the buffers.
        """
        buffers = []
        for group, dtype, numel in zip(self._tensors, self.dtypes, self.numels, strict=True):
            buffer = torch.zeros(-(-numel // multiple) * multiple, dtype=dtype, device=self._device or group[0].device)
            self._views[id(buffer)] = _views(buffer[:numel], group)  # the views keep the buffer, and with it its id
            buffers.append(buffer)
        return buffers

    @torch.no_grad()
    def gather(self, buffers: Sequence[torch.Tensor]) -> None:
        """Overwrites buffers made by `allocate` with the tensors; padding stays."""
        for buffer, group in zip(buffers, self._tensors, strict=True):
            torch._foreach_copy_(self._views[id(buffer)], group)

    @torch.no_grad()
    def scatter(self, buffers: Sequence[torch.Tensor]) -> None:
        """Overwrites the tensors with buffers made by `allocate`; must not be called while a backward may still need them."""
        for buffer, group in zip(buffers, self._tensors, strict=True):
            torch._foreach_copy_(group, self._views[id(buffer)])

    @torch.no_grad()
    def add(self, buffers: Sequence[torch.Tensor]) -> None:
        """Adds buffers made by `allocate` to the tensors; must not be called while a backward may still need them."""
        for buffer, group in zip(buffers, self._tensors, strict=True):
            torch._foreach_add_(group, self._views[id(buffer)])


def segments(parts: Sequence[int], start: int, stop: int) -> tuple[list[int], list[int]]:
    """Returns offsets from `start`, and sizes, of the parts of the tensors that lie in `start` to `stop` of a buffer."""
    offsets, numels = [], []
    end = 0
    for numel in parts:
        begin, end = end, end + numel
        first, last = max(begin, start), min(end, stop)
        if first < last:
            offsets.append(first - start)
            numels.append(last - first)
    return offsets, numels


def _views(buffer: torch.Tensor, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Cuts a buffer into a view for each tensor, in its shape."""
    parts = buffer.split_with_sizes([tensor.numel() for tensor in tensors])
    return [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]
