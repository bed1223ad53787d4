"""One algorithm a file, and the registry of their names."""

from lightning_accel.algorithms.async_average import AsyncAverage
from lightning_accel.algorithms.base import Algorithm, BoundAlgorithm, Context
from lightning_accel.algorithms.bytegrad import ByteGrad
from lightning_accel.algorithms.decentralized import Decentralized
from lightning_accel.algorithms.gradient_allreduce import GradientAllReduce
from lightning_accel.algorithms.low_precision_decentralized import LowPrecisionDecentralized
from lightning_accel.algorithms.qadam import QAdamAlgorithm
from lightning_accel.algorithms.registry import algorithm_names, make_algorithm, register_algorithm

__all__ = [
    "Algorithm",
    "AsyncAverage",
    "BoundAlgorithm",
    "ByteGrad",
    "Context",
    "Decentralized",
    "GradientAllReduce",
    "LowPrecisionDecentralized",
    "QAdamAlgorithm",
    "algorithm_names",
    "make_algorithm",
    "register_algorithm",
]
