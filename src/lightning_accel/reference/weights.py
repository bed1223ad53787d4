"""Means of weights, of all ranks and of two."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def mean(tensors: Sequence[Tensor]) -> Tensor:
    """Returns (x_0 + x_1 + ...) / n, in this order, in float64 (float32 for 16-bit floats), rounded once. Equal weights stay."""
    total = tensors[0].to(torch.float32 if tensors[0].itemsize == 2 else torch.float64)
    for tensor in tensors[1:]:
        total = total + tensor.to(total.dtype)
    return (total / len(tensors)).to(tensors[0].dtype)


def pair_mean(low: Tensor, high: Tensor) -> Tensor:
    """Returns high - (high - low) / 2, in float32 for 16-bit floats; `low` is the lower rank's. Equal weights stay."""
    dtype = torch.float32 if low.itemsize == 2 else low.dtype
    return (high.to(dtype) - (high.to(dtype) - low.to(dtype)) * 0.5).to(low.dtype)


def consensus(weights: Sequence[Sequence[Tensor]], nodes: Sequence[Sequence[int]] | None = None) -> list[Tensor]:
    """Returns what every rank holds afterwards, by tensor: the mean, or the mean of the nodes' means. Integers are rank 0's.

    Args:
        weights: Weights of each rank, of each tensor.
        nodes: Ranks of each node where it is hierarchical; None is flat.
    """
    nodes = nodes if nodes is not None else [[rank] for rank in range(len(weights))]
    results = []
    for tensors in zip(*weights, strict=True):
        if tensors[0].is_floating_point():
            results.append(mean([mean([tensors[rank] for rank in node]) for node in nodes]))
        else:
            results.append(tensors[0])
    return results
