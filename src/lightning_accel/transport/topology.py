"""Who talks to whom. Pure functions of ranks and nodes, apart from `discover`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch.distributed as dist

from lightning_accel import environment

Hierarchical = bool | Literal["auto"]


@dataclass(frozen=True)
class Topology:
    """Ranks of a group by node.

    Attributes:
        nodes: ranks of each node, ascending; nodes ordered by their lowest rank.
    """

    nodes: tuple[tuple[int, ...], ...]

    @classmethod
    def from_names(cls, names: Sequence[str]) -> Topology:
        """Groups ranks by the name of their node."""
        nodes: dict[str, list[int]] = {}
        for rank, name in enumerate(names):
            nodes.setdefault(name, []).append(rank)
        return cls(tuple(tuple(ranks) for ranks in nodes.values()))

    @property
    def is_even(self) -> bool:
        """Whether every node has equally many ranks."""
        return len({len(ranks) for ranks in self.nodes}) == 1

    def use_hierarchy(self, hierarchical: Hierarchical) -> bool:
        """Resolves the option: "auto" means several nodes with equally many ranks, more than one, on each.

        Raises:
            ValueError: for True on nodes of different sizes.
        """
        if hierarchical == "auto":
            return len(self.nodes) > 1 and self.is_even and len(self.nodes[0]) > 1
        if hierarchical and not self.is_even:
            sizes = ", ".join(str(len(ranks)) for ranks in self.nodes)
            raise ValueError(
                f"hierarchical=True needs equally many ranks on every node: got {sizes}. Start as many on each, or leave it "
                'at "auto", which then communicates flat.'
            )
        return bool(hierarchical)

    def node_of(self, rank: int) -> tuple[int, ...]:
        """Ranks on the node of `rank`, ascending."""
        return next(ranks for ranks in self.nodes if rank in ranks)

    def peers_of(self, rank: int) -> tuple[int, ...]:
        """Ranks with the local rank of `rank`, one a node."""
        local_rank = self.node_of(rank).index(rank)
        return tuple(ranks[local_rank] for ranks in self.nodes)


def shift_one_peer(rank: int, n: int, step: int) -> int:
    """The peer of `rank` at communication `step`, of `n` ranks, an even number; the peer's peer is `rank`.

    Each of one half meets one of the other half, and in n/2 steps all of them.
    """
    half = n // 2
    return (step + rank) % half + half if rank < half else (rank - half - step) % half


def discover(process_group: dist.ProcessGroup, node_name: str | None = None) -> Topology:
    """Asks every rank for its node. Collective: all ranks of `process_group` call it in the same order.

    Args:
        process_group: whose ranks are grouped.
        node_name: of this process; None takes `environment.node_name()`.
    """
    names: list[str | None] = [None] * dist.get_world_size(process_group)
    dist.all_gather_object(names, node_name or environment.node_name(), group=process_group)
    return Topology.from_names([name or "" for name in names])
