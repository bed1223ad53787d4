"""Means of weights, of all ranks and of two, and how weights lie in flat buffers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def mean(tensors: Sequence[Tensor]) -> Tensor:
    """(x_0 + x_1 + ...) / n, in this order, in float64 (16-bit floats: in float32), rounded once. Equal ones stay."""
    total = tensors[0].to(torch.float32 if tensors[0].itemsize == 2 else torch.float64)
    for tensor in tensors[1:]:
        total = total + tensor.to(total.dtype)
    return (total / len(tensors)).to(tensors[0].dtype)


def mean_of_two(low: Tensor, high: Tensor) -> Tensor:
    """High - (high - low) / 2, for 16-bit floats in float32; `low` is the lower rank's. Equal ones stay."""
    dtype = torch.float32 if low.itemsize == 2 else low.dtype
    return (high.to(dtype) - (high.to(dtype) - low.to(dtype)) * 0.5).to(low.dtype)


def consensus(weights: Sequence[Sequence[Tensor]], nodes: Sequence[Sequence[int]] | None = None) -> list[Tensor]:
    """What every rank holds afterwards, by tensor: the mean; by nodes, the mean of the nodes' means. Integers: rank 0's.

    Args:
        weights: of each rank, of each tensor.
        nodes: ranks of each node, where it is hierarchical; None is flat.
    """
    nodes = nodes if nodes is not None else [[rank] for rank in range(len(weights))]
    results = []
    for of_ranks in zip(*weights, strict=True):
        if of_ranks[0].is_floating_point():
            results.append(mean([mean([of_ranks[rank] for rank in node]) for node in nodes]))
        else:
            results.append(of_ranks[0])
    return results
