"""Weights exchanged with peers."""

from lightning_accel.bagua.torch_api.algorithms.base import Algorithm, translate_hierarchical


class DecentralizedAlgorithm(Algorithm, name="decentralized"):
    """The algorithm `decentralized`: weights are averaged with peers during forward and backward.

    Args:
        hierarchical: Whether ranks of a node average first, and nodes are the peers. On a single node Bagua's True averages
            all its ranks; here they are the peers.
        peer_selection_mode: "all", or "shift_one" for another peer each time.
        communication_interval: Number of steps between exchanges.
    """

    def __init__(self, hierarchical: bool = True, peer_selection_mode: str = "all", communication_interval: int = 1) -> None:
        super().__init__(
            hierarchical=translate_hierarchical(hierarchical),
            peer_selection_mode=peer_selection_mode,
            communication_interval=communication_interval,
        )


class LowPrecisionDecentralizedAlgorithm(Algorithm, name="low_precision_decentralized"):
    """The algorithm `low_precision_decentralized`: ranks exchange coded differences of weights in a ring.

    Args:
        hierarchical: Whether nodes are the ranks of the ring, as for `DecentralizedAlgorithm`.
        communication_interval: Number of steps between exchanges.
    """

    def __init__(self, hierarchical: bool = True, communication_interval: int = 1) -> None:
        super().__init__(hierarchical=translate_hierarchical(hierarchical), communication_interval=communication_interval)
