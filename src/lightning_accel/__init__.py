"""Train over the network you have: data-parallel training that sends less or waits less.

Importing the package makes the strategy's names known to Lightning (`Trainer(strategy="accel")`), and has no other effect.
Names are imported at their first use: the command line, and its agents on other hosts, do not wait for torch.
"""

import sys
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import lightning_accel_autoload
from lightning_accel.version import __version__

_MODULES = {
    "AccelDataParallel": "data_parallel.wrap",
    "Algorithm": "algorithms.base",
    "AsyncAverage": "algorithms.async_average",
    "BoundAlgorithm": "algorithms.base",
    "ByteGrad": "algorithms.bytegrad",
    "CommunicationError": "background.failure",
    "Context": "algorithms.base",
    "Decentralized": "algorithms.decentralized",
    "GradientAllReduce": "algorithms.gradient_allreduce",
    "LowPrecisionDecentralized": "algorithms.low_precision_decentralized",
    "QAdam": "optim.qadam",
    "QAdamAlgorithm": "algorithms.qadam",
    "QAdamOptimizer": "optim.qadam",
    "Replica": "data_parallel.replica",
    "Statistics": "background.statistics",
    "add_arguments": "launch.arguments",
    "destroy_process_group": "launch.process_group",
    "get_dataloader": "data_parallel.data",
    "get_local_rank": "launch.process_group",
    "get_local_world_size": "launch.process_group",
    "get_logger": "launch.rank_logging",
    "get_node_rank": "launch.process_group",
    "get_rank": "launch.process_group",
    "get_world_size": "launch.process_group",
    "init_process_group": "launch.process_group",
    "load_checkpoint": "checkpoint.plain",
    "register_algorithm": "algorithms.registry",
    "save_checkpoint": "checkpoint.plain",
    "unwrap": "data_parallel.wrap",
    "wrap": "data_parallel.wrap",
}
"""The module of each public name; `__init__.pyi` tells type checkers the same."""

__all__ = ["AccelStrategy", "__version__", *_MODULES]

lightning_accel_autoload.activate()


def __getattr__(name: str) -> Any:
    if name == "AccelStrategy":
        # The class for the root in use: `lightning`, unless `pytorch_lightning` alone has been imported.
        is_standalone = "pytorch_lightning" in sys.modules and "lightning.pytorch" not in sys.modules
        root = "trainer_standalone" if is_standalone else "trainer_unified"
        return import_module(f"lightning_accel.strategy.{root}").AccelStrategy
    if name in _MODULES:
        globals()[name] = getattr(import_module(f"lightning_accel.{_MODULES[name]}"), name)
        return globals()[name]
    if not name.startswith("_") and find_spec(f"lightning_accel.{name}") is not None:
        return import_module(f"lightning_accel.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), *__all__]
