"""Adam whose momentum travels at eight bits."""

from lightning_accel.bagua.torch_api.algorithms.base import Algorithm, translate_hierarchical
from lightning_accel.optim import QAdamOptimizer

__all__ = ["QAdamAlgorithm", "QAdamOptimizer"]


class QAdamAlgorithm(Algorithm, name="qadam"):
    """The algorithm `lightning_accel.QAdamAlgorithm`.

    Args:
        q_adam_optimizer: QAdamOptimizer, which must be among those given to `with_bagua`.
        hierarchical: Whether ranks of a node sum first.
    """

    def __init__(self, q_adam_optimizer: QAdamOptimizer, hierarchical: bool = True) -> None:
        super().__init__(hierarchical=translate_hierarchical(hierarchical))
        self.optimizer = q_adam_optimizer
