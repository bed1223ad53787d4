"""decentralized: x_r <- mean of the x of r and its peers, then x_r <- x_r - update(g(x_r before))."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from lightning_accel.reference.weights import mean, pair_mean


def peer(rank: int, n: int, communication: int) -> int:
    """Returns the peer of `rank` of `n`, an even number, at communication s = 0, 1, 2 ... with "shift_one"."""
    if rank < n // 2:
        return (communication + rank) % ((n + 1) // 2) + n // 2
    return (rank - n // 2 - communication) % (n // 2)


def decentralized(
    weights: Sequence[Sequence[Tensor]],
    communication: int,
    peer_selection_mode: str = "all",
    *,
    nodes: Sequence[Sequence[int]] | None = None,
) -> list[list[Tensor]]:
    """Returns what each rank holds after an exchange, by parameter.

    Args:
        weights: Weights of each rank, of each parameter.
        communication: Number of exchanges before this one.
        peer_selection_mode: "all" or "shift_one".
        nodes: Ranks of each node where it is hierarchical: they average first, then nodes are peers; None is flat.
    """
    nodes = nodes if nodes is not None else [[rank] for rank in range(len(weights))]
    results: list[list[Tensor]] = [[] for _ in weights]
    for tensors in zip(*weights, strict=True):
        node_means = [mean([tensors[rank] for rank in node]) for node in nodes]
        for m, node in enumerate(nodes):
            if len(nodes) == 1:
                result = node_means[0]
            elif peer_selection_mode == "all":
                result = mean(node_means)
            else:
                other = peer(m, len(nodes), communication)
                result = pair_mean(node_means[min(m, other)], node_means[max(m, other)])
            for rank in node:
                results[rank].append(result)
    return results
