"""The sum of all ranks' tensors, as the two-shot all_reduce computes it: flat and by nodes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_accel.reference.codecs import canonical, quantise, value_dtype, with_feedback


@dataclass
class Residuals:
    """What codes have lost of one parameter: of each rank's (or node's) tensor, and of the sum. One-dimensional, float32."""

    workers: list[Tensor]
    server: Tensor

    @classmethod
    def zeros(cls, num_workers: int, numel: int) -> Residuals:
        """Makes the residuals before anything is sent."""
        return cls([torch.zeros(numel, dtype=torch.float32) for _ in range(num_workers)], torch.zeros(numel, dtype=torch.float32))

    def copy(self) -> Residuals:
        """Returns residuals that a message may overwrite."""
        return Residuals([*self.workers], self.server)


def compressed_all_reduce(tensors: Sequence[Tensor], codec: str, divisor: float, residuals: Residuals | None = None) -> Tensor:
    """Returns Q(sum_r Q(x_r) / divisor), which every rank holds afterwards.

    With residuals d_r and e, each Q codes its value plus what it lost before, and keeps what it loses:
    q_r = Q(x_r + d_r), d_r <- x_r + d_r - q_r; y = sum_r q_r / divisor, result = Q(y + e), e <- y + e - result.

    Args:
        tensors: Tensor of each rank for one parameter; any shape, all alike.
        codec: Q.
        divisor: Number of ranks for the mean, 1 for the sum.
        residuals: Residuals of this parameter; overwritten. None is no error feedback.
    """
    dtype = value_dtype(codec, tensors[0].dtype)
    values = [tensor.flatten().to(dtype) for tensor in tensors]
    if residuals is None:
        coded = [quantise(value, codec) for value in values]
    else:
        both = [with_feedback(value, residual, codec) for value, residual in zip(values, residuals.workers, strict=True)]
        coded, residuals.workers = [result for result, _ in both], [lost for _, lost in both]
    total = coded[0]
    for value in coded[1:]:  # in rank order
        total = total + value
    mean = total / divisor
    if residuals is None:
        return _result(quantise(mean, codec), tensors[0])
    result, residuals.server = with_feedback(mean, residuals.server, codec)
    return _result(result, tensors[0])


def hierarchical_all_reduce(
    tensors: Sequence[Tensor],
    nodes: Sequence[Sequence[int]],
    codec: str,
    divisor: float,
    residuals: Residuals | None = None,
) -> Tensor:
    """Returns Q(sum_m Q(y_m) / divisor) with y_m = sum of x_r for r in node m; there is no Q with a single node.

    Args:
        tensors: Tensor of each rank for one parameter; any shape, all alike.
        nodes: Ranks of each node, in the order of summation.
        codec: Q, between nodes.
        divisor: Number of ranks for the mean, 1 for the sum.
        residuals: Residuals of this parameter, with nodes as workers; overwritten. None is no error feedback.
    """
    # Sums inside a node are float32, or float64 for float64, whatever the codec computes in.
    dtype = value_dtype("none", tensors[0].dtype)
    sums = []
    for node in nodes:
        total = torch.zeros(tensors[0].numel(), dtype=dtype)
        for rank in node:
            total = total + tensors[rank].flatten().to(dtype)
        sums.append(total)
    mean = sums[0] / divisor if len(nodes) == 1 else compressed_all_reduce(sums, codec, divisor, residuals)
    return _result(mean, tensors[0])


def _result(values: Tensor, like: Tensor) -> Tensor:
    return canonical(values.to(like.dtype)).reshape(like.shape)
