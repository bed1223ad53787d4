"""Train over the network you have: data-parallel training that sends less or waits less.

Importing the package makes the strategy's names known to Lightning (`Trainer(strategy="accel")`), and has no other effect.
"""

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

import lightning_accel_autoload
from lightning_accel.algorithms import (
    Algorithm,
    BoundAlgorithm,
    ByteGrad,
    Context,
    GradientAllReduce,
    register_algorithm,
)
from lightning_accel.communicator import CommunicationError, Statistics
from lightning_accel.replica import Replica

if TYPE_CHECKING:
    from lightning_accel.strategy.lightning_root import AccelStrategy

__all__ = [
    "AccelStrategy",
    "Algorithm",
    "BoundAlgorithm",
    "ByteGrad",
    "CommunicationError",
    "Context",
    "GradientAllReduce",
    "Replica",
    "Statistics",
    "register_algorithm",
]

lightning_accel_autoload.activate()


def __getattr__(name: str) -> Any:
    if name == "AccelStrategy":
        # The class for the root in use: `lightning`, unless `pytorch_lightning` alone has been imported.
        only_separate = "pytorch_lightning" in sys.modules and "lightning.pytorch" not in sys.modules
        root = "pytorch_lightning_root" if only_separate else "lightning_root"
        return import_module(f"lightning_accel.strategy.{root}").AccelStrategy
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
