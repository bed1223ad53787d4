"""Weights as flat buffers, one for each dtype: what algorithms that exchange weights send."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lightning_accel.codecs import DTYPES


class FlatWeights:
    """Copies weights to flat buffers and back, by one multi-tensor operation for each dtype.

    A buffer holds the weights of one dtype one behind another, each in the order of its elements, whatever its memory format.
    Nothing is allocated but by the constructor and `allocate`.

    Args:
        tensors: a replica's weights, in the order of `named_parameters`; one that is given twice counts once. Those that need
            no gradient are left out: they are equal on all ranks.

    Attributes:
        dtypes: of the buffers, in the order in which the weights first have them.
        numels: elements of each buffer.
        parts: for each buffer the elements of each weight in it.

    Raises:
        ValueError: for a dtype that cannot be sent.
    """

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        trainable = {id(tensor): tensor for tensor in tensors if tensor.requires_grad}.values()
        for tensor in trainable:
            if tensor.dtype not in DTYPES:
                raise ValueError(f"weights must be {', '.join(str(dtype) for dtype in DTYPES)} to be sent: got {tensor.dtype}")
        self.dtypes = list(dict.fromkeys(tensor.dtype for tensor in trainable))
        self._weights = [[tensor for tensor in trainable if tensor.dtype == dtype] for dtype in self.dtypes]
        self.parts = [[tensor.numel() for tensor in weights] for weights in self._weights]
        self.numels = [sum(part) for part in self.parts]
        self._views: dict[int, list[torch.Tensor]] = {}

    def allocate(self) -> list[torch.Tensor]:
        """One buffer for each dtype, of zeros, on the weights' device. Views into it are kept as long as this object."""
        buffers = []
        for weights, dtype, numel in zip(self._weights, self.dtypes, self.numels, strict=True):
            buffer = torch.zeros(numel, dtype=dtype, device=weights[0].device)
            self._views[id(buffer)] = _views(buffer, weights)  # the views keep the buffer, and with it its id
            buffers.append(buffer)
        return buffers

    @torch.no_grad()
    def gather(self, buffers: Sequence[torch.Tensor]) -> None:
        """Overwrites buffers made by `allocate` with the weights."""
        for buffer, weights in zip(buffers, self._weights, strict=True):
            torch._foreach_copy_(self._views[id(buffer)], weights)

    @torch.no_grad()
    def scatter(self, buffers: Sequence[torch.Tensor]) -> None:
        """Overwrites the weights with what buffers made by `allocate` hold; not while a backward may still need them."""
        for buffer, weights in zip(buffers, self._weights, strict=True):
            torch._foreach_copy_(weights, self._views[id(buffer)])


def _views(buffer: torch.Tensor, weights: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The part of a buffer that belongs to each weight, in its shape."""
    parts = buffer.split_with_sizes([weight.numel() for weight in weights])
    return [part.view(weight.shape) for part, weight in zip(parts, weights, strict=True)]
