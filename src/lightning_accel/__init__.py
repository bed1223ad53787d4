"""Train over the network you have: data-parallel training that sends less or waits less.

Importing the package makes the strategy's names known to Lightning (`Trainer(strategy="accel")`), and has no other effect.
Names are imported at their first use: the command line, and its agents on other hosts, do not wait for torch.
"""

import sys
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import lightning_accel_autoload

if TYPE_CHECKING:
    from lightning_accel.algorithms import (
        Algorithm,
        AsyncAverage,
        BoundAlgorithm,
        ByteGrad,
        Context,
        Decentralized,
        GradientAllReduce,
        LowPrecisionDecentralized,
        QAdamAlgorithm,
        register_algorithm,
    )
    from lightning_accel.checkpoint import load_checkpoint, save_checkpoint
    from lightning_accel.communicator import CommunicationError, Statistics
    from lightning_accel.data_parallel import AccelDataParallel, get_dataloader, unwrap, wrap
    from lightning_accel.optim import QAdam, QAdamOptimizer
    from lightning_accel.process_group import (
        add_arguments,
        destroy_process_group,
        get_local_rank,
        get_local_world_size,
        get_logger,
        get_node_rank,
        get_rank,
        get_world_size,
        init_process_group,
    )
    from lightning_accel.replica import Replica
    from lightning_accel.strategy.lightning_root import AccelStrategy

__all__ = [
    "AccelDataParallel",
    "AccelStrategy",
    "Algorithm",
    "AsyncAverage",
    "BoundAlgorithm",
    "ByteGrad",
    "CommunicationError",
    "Context",
    "Decentralized",
    "GradientAllReduce",
    "LowPrecisionDecentralized",
    "QAdam",
    "QAdamAlgorithm",
    "QAdamOptimizer",
    "Replica",
    "Statistics",
    "add_arguments",
    "destroy_process_group",
    "get_dataloader",
    "get_local_rank",
    "get_local_world_size",
    "get_logger",
    "get_node_rank",
    "get_rank",
    "get_world_size",
    "init_process_group",
    "load_checkpoint",
    "register_algorithm",
    "save_checkpoint",
    "unwrap",
    "wrap",
]

_PLACES = ("algorithms", "checkpoint", "communicator", "data_parallel", "optim", "process_group", "replica")

lightning_accel_autoload.activate()


def __getattr__(name: str) -> Any:
    if name == "AccelStrategy":
        # The class for the root in use: `lightning`, unless `pytorch_lightning` alone has been imported.
        only_separate = "pytorch_lightning" in sys.modules and "lightning.pytorch" not in sys.modules
        root = "pytorch_lightning_root" if only_separate else "lightning_root"
        return import_module(f"lightning_accel.strategy.{root}").AccelStrategy
    if name in __all__:
        modules = (import_module(f"lightning_accel.{place}") for place in _PLACES)
        globals()[name] = next(getattr(module, name) for module in modules if hasattr(module, name))
        return globals()[name]
    if not name.startswith("_") and find_spec(f"lightning_accel.{name}") is not None:
        return import_module(f"lightning_accel.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), *__all__]
