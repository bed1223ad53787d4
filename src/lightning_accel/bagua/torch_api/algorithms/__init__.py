"""One module an algorithm, as in Bagua."""

from lightning_accel.bagua.torch_api.algorithms import (
    async_model_average,
    bytegrad,
    decentralized,
    gradient_allreduce,
    q_adam,
)
from lightning_accel.bagua.torch_api.algorithms.base import Algorithm

__all__ = ["Algorithm", "async_model_average", "bytegrad", "decentralized", "gradient_allreduce", "q_adam"]
