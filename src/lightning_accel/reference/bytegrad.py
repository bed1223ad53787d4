"""ByteGrad: g <- Q(1/n sum_r Q(g_r)) for each block of each parameter, with or without error feedback."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from lightning_accel.reference.collectives import Residuals, compressed_all_reduce, hierarchical_all_reduce


def bytegrad(
    gradients: Sequence[Sequence[Tensor]],
    codec: str = "int8",
    *,
    nodes: Sequence[Sequence[int]] | None = None,
    average: bool = True,
    residuals: Sequence[Residuals] | None = None,
) -> list[Tensor]:
    """Returns what every rank holds as gradients, by parameter. A single rank keeps its own.

    Args:
        gradients: Gradients of each rank, of each parameter.
        codec: Q.
        nodes: Ranks of each node where it is hierarchical; None is flat.
        average: Whether gradients are averaged; False leaves the sum.
        residuals: Residuals of each parameter; overwritten. None is no error feedback.
    """
    if len(gradients) == 1:
        return list(gradients[0])
    divisor = len(gradients) if average else 1
    all_residuals = residuals if residuals is not None else [None] * len(gradients[0])
    by_parameter = zip(zip(*gradients, strict=True), all_residuals, strict=True)
    if nodes is None:
        return [compressed_all_reduce(tensors, codec, divisor, kept) for tensors, kept in by_parameter]
    return [hierarchical_all_reduce(tensors, nodes, codec, divisor, kept) for tensors, kept in by_parameter]
