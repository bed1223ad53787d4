"""Mean gradients at full precision."""

from lightning_accel.bagua.torch_api.algorithms.base import Algorithm, by_nodes


class GradientAllReduceAlgorithm(Algorithm, name="gradient_allreduce"):
    """See `lightning_accel.GradientAllReduce`.

    Args:
        hierarchical: ranks of a node sum first.
        average: the mean; False leaves the sum.
    """

    def __init__(self, hierarchical: bool = False, average: bool = True) -> None:
        super().__init__(hierarchical=by_nodes(hierarchical), average=average)
