"""The sum of all ranks' tensors as the two-shot all_reduce computes it: flat, and by nodes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_accel.reference.codecs import canonical, quantise, value_dtype


def compressed_all_reduce(tensors: Sequence[Tensor], codec: str, divisor: float) -> Tensor:
    """Q(sum_r Q(x_r) / divisor): what every rank holds afterwards.

    Args:
        tensors: one parameter's, of each rank; any shape, all alike.
        codec: Q.
        divisor: number of ranks for the mean, 1 for the sum.
    """
    dtype = value_dtype(codec, tensors[0].dtype)
    total = quantise(tensors[0].flatten().to(dtype), codec)
    for tensor in tensors[1:]:  # in rank order
        total = total + quantise(tensor.flatten().to(dtype), codec)
    return _result(quantise(total / divisor, codec), tensors[0])


def hierarchical_all_reduce(tensors: Sequence[Tensor], nodes: Sequence[Sequence[int]], codec: str, divisor: float) -> Tensor:
    """Q(sum_m Q(y_m) / divisor) with y_m = sum of x_r for r in node m; no Q where there is one node.

    Args:
        tensors: one parameter's, of each rank; any shape, all alike.
        nodes: ranks of each node, in the order of summation.
        codec: Q, between nodes.
        divisor: number of ranks for the mean, 1 for the sum.
    """
    # Sums inside a node are float32, and float64 for float64, whatever the codec makes of them after that.
    dtype = value_dtype("none", tensors[0].dtype)
    sums = []
    for node in nodes:
        total = torch.zeros(tensors[0].numel(), dtype=dtype)
        for rank in node:
            total = total + tensors[rank].flatten().to(dtype)
        sums.append(total)
    mean = sums[0] / divisor if len(nodes) == 1 else compressed_all_reduce(sums, codec, divisor)
    return _result(mean, tensors[0])


def _result(values: Tensor, like: Tensor) -> Tensor:
    return canonical(values.to(like.dtype)).reshape(like.shape)
