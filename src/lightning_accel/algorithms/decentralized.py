"""Averages weights with peers, at full precision, while forward and backward compute."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from lightning_accel.algorithms.base import Algorithm, BoundAlgorithm, Context
from lightning_accel.algorithms.common.option_checks import check_communication_interval, check_hierarchical
from lightning_accel.algorithms.common.weight_exchange import WeightExchange
from lightning_accel.algorithms.registry import register_algorithm
from lightning_accel.collectives import weight_means
from lightning_accel.transport.scratch import Scratch
from lightning_accel.transport.topology import Hierarchical, shift_one_peer

PEER_SELECTION_MODES = ("all", "shift_one")


@register_algorithm("decentralized")
@dataclass(frozen=True)
class Decentralized(Algorithm):
    """Lets every rank step with its own gradient, from the mean of its weights and its peers'.

    x_{t+1} = mean(x_t of this rank and its peers) - update(g(x_t))

    The weights are sent when a round begins; while they travel, forward and backward compute the gradient at x_t. Before the
    optimizer steps, the mean takes their place. Peers are all ranks, or with "shift_one" one other rank: at communication
    s, rank r < n/2 meets n/2 + (s + r) mod n/2, so in n/2 communications each of one half meets all of the other.

    Source: decentralized SGD of Bagua (Gan et al. 2021, arXiv:2107.01499), after Lian et al. (2017, arXiv:1705.09056). It
    differs in that means are exact: equal weights stay equal to the bit.

    Cost of a communication for each rank: "all" sends 2 (n-1)/n of the weights' bytes, like an all_reduce of gradients, in two
    messages to each other rank; "shift_one" sends the weights' bytes in one message. Memory: the weights, twice. On a single
    process it does nothing.

    Fails when: the ranks' weights are far apart, after many rounds without communication or with a large step: then the mean
    is a model that nobody has trained. `ModelCheckpoint` and validation see the mean of all ranks (consensus).

    Args:
        peer_selection_mode: "all", or "shift_one", which needs an even number of ranks (of nodes, if hierarchical).
        communication_interval: Number of rounds from one communication to the next; the first round communicates.
        hierarchical: Whether ranks of a node combine what they have first, uncompressed, so that less travels between nodes:
            True, False, or "auto": when there are several nodes with equally many ranks, more than one, on each.

    Example:
        >>> Decentralized(peer_selection_mode="shift_one", communication_interval=2).hierarchical
        'auto'
    """

    peer_selection_mode: Literal["all", "shift_one"] = "all"
    communication_interval: int = 1
    hierarchical: Hierarchical = "auto"

    def __post_init__(self) -> None:
        if self.peer_selection_mode not in PEER_SELECTION_MODES:
            raise ValueError(
                f"peer_selection_mode must be one of {', '.join(PEER_SELECTION_MODES)}: got {self.peer_selection_mode!r}"
            )
        check_communication_interval(self.communication_interval)
        check_hierarchical(self.hierarchical)

    def bind(self, context: Context) -> BoundAlgorithm:
        """Makes the flat or the hierarchical form, as the nodes allow. Collective."""
        topology, n = context.communicator.topology, context.communicator.world_size
        is_hierarchical = topology.use_hierarchy(self.hierarchical)
        peers, what = (len(topology.nodes), "nodes") if is_hierarchical else (n, "ranks")
        if self.peer_selection_mode == "shift_one" and peers > 1 and peers % 2:
            raise ValueError(
                f'peer_selection_mode="shift_one" pairs {what}, so it needs an even number of them: got {peers}. '
                f'Start one more or one less, or take "all".'
            )
        return _Decentralized(context, self)


class _Decentralized(WeightExchange):
    def __init__(self, context: Context, options: Decentralized) -> None:
        super().__init__(context, options.hierarchical)
        self._options = options

    def before_forward(self) -> None:
        if self.rounds % self._options.communication_interval == 0:
            self.start_exchange()

    def before_step(self) -> None:
        self.finish_exchange()
        super().before_step()

    def exchange(self, buffer: int, share: torch.Tensor, scratch: Scratch) -> None:
        if self._options.peer_selection_mode == "all":
            weight_means.mean(share, self.inter_node, scratch)
        else:
            communication = self.rounds // self._options.communication_interval
            peer = shift_one_peer(self.inter_node.rank, self.inter_node.world_size, communication)
            weight_means.mean_with(peer, share, self.inter_node, scratch)
