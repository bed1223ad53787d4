"""Weights exchanged with peers."""

from lightning_accel.bagua.torch_api.algorithms.base import Algorithm, by_nodes


class DecentralizedAlgorithm(Algorithm, name="decentralized"):
    """The algorithm `decentralized`: weights averaged with peers, beside forward and backward.

    Args:
        hierarchical: ranks of a node average first, and nodes are the peers. On a single node Bagua's True averages all its
            ranks; here they are the peers.
        peer_selection_mode: "all", or "shift_one": another peer each time.
        communication_interval: of the exchange, in steps.
    """

    def __init__(self, hierarchical: bool = True, peer_selection_mode: str = "all", communication_interval: int = 1) -> None:
        super().__init__(
            hierarchical=by_nodes(hierarchical),
            peer_selection_mode=peer_selection_mode,
            communication_interval=communication_interval,
        )


class LowPrecisionDecentralizedAlgorithm(Algorithm, name="low_precision_decentralized"):
    """The algorithm `low_precision_decentralized`: coded differences of weights, exchanged in a ring.

    Args:
        hierarchical: as for `DecentralizedAlgorithm`.
        communication_interval: of the exchange, in steps.
    """

    def __init__(self, hierarchical: bool = True, communication_interval: int = 1) -> None:
        super().__init__(hierarchical=by_nodes(hierarchical), communication_interval=communication_interval)
