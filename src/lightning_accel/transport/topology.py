"""Which ranks share a node and which are peers: pure functions, except for the collective `discover`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch.distributed as dist

from lightning_accel import environment

Hierarchical = bool | Literal["auto"]


@dataclass(frozen=True)
class Topology:
    """The ranks of a group, by node.

    Attributes:
        nodes: Ranks of each node, ascending; nodes are ordered by their lowest rank.
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
        """Tells whether every node has equally many ranks."""
        return len({len(ranks) for ranks in self.nodes}) == 1

    def use_hierarchy(self, hierarchical: Hierarchical) -> bool:
        """Resolves the option: "auto" is True for several nodes with equally many ranks, more than one, on each.

        Raises:
            ValueError: `hierarchical` is True, but nodes differ in size.
        """
        if hierarchical == "auto":
            return len(self.nodes) > 1 and self.is_even and len(self.nodes[0]) > 1
        if hierarchical and not self.is_even:
            sizes = ", ".join(str(len(ranks)) for ranks in self.nodes)
            raise ValueError(
                f"hierarchical=True needs equally many ranks on every node: got {sizes}. Start as many on each, or choose "
                '"auto", which communicates flat on such nodes.'
            )
        return bool(hierarchical)

    def node_of(self, rank: int) -> tuple[int, ...]:
        """Returns the ranks on the node of `rank`, ascending."""
        return next(ranks for ranks in self.nodes if rank in ranks)

    def peers_of(self, rank: int) -> tuple[int, ...]:
        """Returns the ranks with the same local rank as `rank`, one per node."""
        local_rank = self.node_of(rank).index(rank)
        return tuple(ranks[local_rank] for ranks in self.nodes)


def shift_one_peer(rank: int, n: int, step: int) -> int:
    """Returns the peer of `rank` at communication `step`, for an even number `n` of ranks; the peer's peer is `rank`.

    A rank of one half meets a rank of the other half at each step, and all of them in n/2 steps.
    """
    half = n // 2
    return (step + rank) % half + half if rank < half else (rank - half - step) % half


def discover(process_group: dist.ProcessGroup, node_name: str | None = None) -> Topology:
    """Asks every rank for its node. Collective: all ranks of `process_group` call it in the same order.

    Args:
        process_group: Group whose ranks are asked.
        node_name: Name of this process's node; None takes `environment.node_name()`.
    """
    names: list[str | None] = [None] * dist.get_world_size(process_group)
    dist.all_gather_object(names, node_name or environment.node_name(), group=process_group)
    return Topology.from_names([name or "" for name in names])
