"""Adam whose momentum travels at eight bits."""

from typing import Any

import torch

from lightning_accel.bagua.torch_api.algorithms.base import Algorithm, by_nodes


class QAdamAlgorithm(Algorithm, name="qadam"):
    """The algorithm `qadam`.

    Args:
        q_adam_optimizer: a QAdamOptimizer, which must be among those given to `with_bagua`.
        hierarchical: ranks of a node sum first.
    """

    def __init__(self, q_adam_optimizer: torch.optim.Optimizer, hierarchical: bool = True) -> None:
        super().__init__(hierarchical=by_nodes(hierarchical))
        self.optimizer = q_adam_optimizer


def __getattr__(name: str) -> Any:
    if name == "QAdamOptimizer":
        from lightning_accel import QAdam

        return QAdam
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
