"""gradient_allreduce: g <- 1/n sum_r g_r."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from lightning_accel.reference.collectives import hierarchical_all_reduce


def gradient_allreduce(
    gradients: Sequence[Sequence[Tensor]], *, nodes: Sequence[Sequence[int]] | None = None, average: bool = True
) -> list[Tensor]:
    """Returns what every rank holds as gradients, by parameter.

    By nodes, every bit is specified. Flat, gradients are divided first and summed in rank order; from three ranks on, a backend
    may sum in another order and differ in the last bits.

    Args:
        gradients: Gradients of each rank, of each parameter.
        nodes: Ranks of each node where it is hierarchical; None is flat.
        average: Whether gradients are averaged; False leaves the sum.
    """
    divisor = len(gradients) if average else 1
    by_parameter = zip(*gradients, strict=True)
    if nodes is not None:
        return [hierarchical_all_reduce(tensors, nodes, "none", divisor) for tensors in by_parameter]
    means = []
    for tensors in by_parameter:
        total = tensors[0] / divisor
        for gradient in tensors[1:]:
            total = total + gradient / divisor
        means.append(total)
    return means
