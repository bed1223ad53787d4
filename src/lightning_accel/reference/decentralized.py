"""decentralized: x_r <- mean of the x of r and its peers, then x_r <- x_r - update(g(x_r before))."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from lightning_accel.reference.weights import mean, mean_of_two


def peer(rank: int, n: int, communication: int) -> int:
    """Whom `rank` of `n`, an even number, meets at communication s = 0, 1, 2 ... with "shift_one"."""
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
    """What each rank holds after an exchange, by parameter.

    Args:
        weights: of each rank, of each parameter.
        communication: how many came before.
        peer_selection_mode: "all" or "shift_one".
        nodes: ranks of each node, where it is hierarchical: their mean first, then peers are nodes; None is flat.
    """
    nodes = nodes if nodes is not None else [[rank] for rank in range(len(weights))]
    results: list[list[Tensor]] = [[] for _ in weights]
    for of_ranks in zip(*weights, strict=True):
        of_nodes = [mean([of_ranks[rank] for rank in node]) for node in nodes]
        for m, node in enumerate(nodes):
            if len(nodes) == 1:
                result = of_nodes[0]
            elif peer_selection_mode == "all":
                result = mean(of_nodes)
            else:
                other = peer(m, len(nodes), communication)
                result = mean_of_two(of_nodes[min(m, other)], of_nodes[max(m, other)])
            for rank in node:
                results[rank].append(result)
    return results
