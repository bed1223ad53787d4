"""Mean gradients at full precision."""

from lightning_accel.bagua.torch_api.algorithms.base import Algorithm, translate_hierarchical


class GradientAllReduceAlgorithm(Algorithm, name="gradient_allreduce"):
    """The algorithm `lightning_accel.GradientAllReduce`.

    Args:
        hierarchical: Whether ranks of a node sum first.
        average: Whether gradients are averaged; False leaves the sum.
    """

    def __init__(self, hierarchical: bool = False, average: bool = True) -> None:
        super().__init__(hierarchical=translate_hierarchical(hierarchical), average=average)
