"""gradient_allreduce: g <- 1/n sum_r g_r."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from lightning_accel.reference.collectives import hierarchical_all_reduce


def gradient_allreduce(
    gradients: Sequence[Sequence[Tensor]], *, nodes: Sequence[Sequence[int]] | None = None, average: bool = True
) -> list[Tensor]:
    """What every rank holds as gradients, by parameter.

    By nodes, bit for bit. Flat, each gradient is divided first and the sum runs in rank order here; a backend's own order of
    summation may differ, and with it the last bits, from three ranks on.

    Args:
        gradients: of each rank, of each parameter.
        nodes: ranks of each node, where it is hierarchical; None is flat.
        average: the mean; False leaves the sum.
    """
    divisor = len(gradients) if average else 1
    by_parameter = zip(*gradients, strict=True)
    if nodes is not None:
        return [hierarchical_all_reduce(of_ranks, nodes, "none", divisor) for of_ranks in by_parameter]
    means = []
    for of_ranks in by_parameter:
        total = of_ranks[0] / divisor
        for gradient in of_ranks[1:]:
            total = total + gradient / divisor
        means.append(total)
    return means
