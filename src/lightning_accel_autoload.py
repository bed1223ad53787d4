"""Registers the strategy's names with Lightning, without an import by the user.

Lightning has no entry point for strategies. PyTorch has one that runs at the end of `import torch` (group `torch.backends`,
turned off by TORCH_DEVICE_BACKEND_AUTOLOAD=0), and everything in Lightning imports torch first. So this module installs an import
finder, which registers factories with a Lightning root as soon as the root's `strategies` module has been executed. A factory
imports the package when it makes a strategy, not before.

This module imports only the standard library, and nothing in it may raise: an exception would break `import torch`.
"""

import contextlib
import functools
import importlib
import importlib.abc
import importlib.util
import sys
from typing import Any

ALGORITHMS = ("gradient_allreduce", "bytegrad", "qadam", "decentralized", "low_precision_decentralized", "async")
"""Algorithms with a strategy name of their own, `accel_<algorithm>`."""

_ROOTS = {
    "lightning.pytorch.strategies": ("StrategyRegistry", "lightning_accel.strategy.trainer_unified"),
    "pytorch_lightning.strategies": ("StrategyRegistry", "lightning_accel.strategy.trainer_standalone"),
    "lightning.fabric.strategies": ("STRATEGY_REGISTRY", "lightning_accel.strategy.fabric_unified"),
    "lightning_fabric.strategies": ("STRATEGY_REGISTRY", "lightning_accel.strategy.fabric_standalone"),
}
"""{module with a registry: (name of the registry, our module with the strategy for it)}."""


START_METHODS = {"": "popen", "_spawn": "spawn", "_fork": "fork", "_notebook": "fork"}
"""{part of a name: how Lightning starts the processes}, as in the names of Lightning's `ddp`."""

FLAGS = {
    "": {},
    "_find_unused_parameters_true": {"find_unused_parameters": True},
    "_find_unused_parameters_false": {"find_unused_parameters": False},
}
"""{end of a name: arguments of DistributedDataParallel}."""


def strategy_names() -> dict[str, dict[str, Any]]:
    """Returns all strategy names, each with the arguments that it passes to the strategy; `accel` is gradient_allreduce."""
    bases = {"accel": "gradient_allreduce", **{f"accel_{algorithm}": algorithm for algorithm in ALGORITHMS}}
    return {
        base + start + flag: {"algorithm": algorithm, "start_method": method, **arguments}
        for base, algorithm in bases.items()
        for start, method in START_METHODS.items()
        for flag, arguments in FLAGS.items()
    }


def register(registry: Any, implementation: str) -> None:
    """Adds the names to a root's registry; names that the registry has already stay as they are.

    Args:
        registry: Lightning's `StrategyRegistry`.
        implementation: Name of the module whose `AccelStrategy` the names create.
    """

    def accel_strategy(registered_name: str, /, **arguments: Any) -> Any:
        strategy = importlib.import_module(implementation).AccelStrategy(**arguments)
        strategy.registered_name = registered_name
        return strategy

    for name, arguments in strategy_names().items():
        if name not in registry:
            described = ", ".join(f"{key}={value!r}" for key, value in arguments.items())
            strategy = functools.partial(accel_strategy, name)
            registry.register(name, strategy, description=f"AccelStrategy({described})", **arguments)


def activate() -> None:
    """Registers the names with every Lightning root that is or will be imported. Idempotent; never raises."""
    for name, (attribute, implementation) in _ROOTS.items():
        with contextlib.suppress(Exception):  # neither `import torch` nor another root may fail because of one
            registry = getattr(sys.modules.get(name), attribute, None)
            if registry is not None:
                register(registry, implementation)
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


class _Finder(importlib.abc.MetaPathFinder):
    """Lets other finders find a root's module, and wraps its loader."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name not in _ROOTS:
            return None
        try:
            sys.meta_path.remove(self)
            try:
                spec = importlib.util.find_spec(name)
            finally:
                sys.meta_path.insert(0, self)
        except Exception:
            return None  # the import system will find the same error by itself
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


class _Loader(importlib.abc.Loader):
    """Registers the names after its module has been executed, and gives the module its own loader back."""

    def __init__(self, loader: importlib.abc.Loader) -> None:
        self._loader = loader

    def create_module(self, spec: Any) -> Any:
        return self._loader.create_module(spec)

    def exec_module(self, module: Any) -> None:
        module.__spec__.loader = module.__loader__ = self._loader
        self._loader.exec_module(module)
        activate()
