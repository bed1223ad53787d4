"""The algorithms that a script gives to `with_bagua`: ours, under Bagua's names and with Bagua's arguments."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import nn

import lightning_accel.algorithms
from lightning_accel.algorithms import make_algorithm
from lightning_accel.data_parallel.replica import Replica
from lightning_accel.data_parallel.wrap import AccelDataParallel
from lightning_accel.transport.topology import Hierarchical


class Algorithm:
    """Base of Bagua's algorithms; `Algorithm.init("bytegrad")` makes one by its name.

    To write your own algorithm, use `lightning_accel.register_algorithm`, which `with_bagua` accepts too; Bagua's way (`reify`,
    `AlgorithmImpl`) is not offered.

    Args:
        **options: Options of the algorithm, as `lightning_accel` names them.

    Attributes:
        accel_algorithm: Algorithm of `lightning_accel` that communicates.
        optimizer: Optimizer that the algorithm works with; None where any will do.
    """

    name: ClassVar[str]
    _by_name: ClassVar[dict[str, type[Algorithm]]] = {}

    def __init_subclass__(cls, name: str) -> None:
        cls.name = name
        cls._by_name[name] = cls

    def __init__(self, **options: Any) -> None:
        self.accel_algorithm = make_algorithm(self.name, options)
        self.optimizer: torch.optim.Optimizer | None = None

    @classmethod
    def init(cls, name: str, **kwargs: Any) -> Algorithm:
        """Makes an algorithm by its name, with its constructor's arguments.

        Raises:
            ValueError: If the name is unknown.
        """
        if name not in cls._by_name:
            raise ValueError(f"algorithm must be one of {', '.join(cls._by_name)}: got {name!r}")
        return cls._by_name[name](**kwargs)


def translate_hierarchical(hierarchical: bool) -> Hierarchical:
    """Translates Bagua's True, which never refuses, to "auto", which communicates by nodes where there are several equal ones."""
    return "auto" if hierarchical else False


def unwrap_algorithm(
    algorithm: object, optimizers: Sequence[torch.optim.Optimizer]
) -> lightning_accel.algorithms.Algorithm | str:
    """Returns the algorithm that `lightning_accel.wrap` takes, for one of Bagua's names or one of our own.

    Raises:
        TypeError: If it is another object.
        ValueError: If the algorithm's own optimizer is not among `optimizers`.
    """
    if isinstance(algorithm, Algorithm):
        if algorithm.optimizer is not None and all(optimizer is not algorithm.optimizer for optimizer in optimizers):
            raise ValueError(f"{type(algorithm).__name__} needs its own optimizer among the optimizers")
        return algorithm.accel_algorithm
    if isinstance(algorithm, (str, lightning_accel.algorithms.Algorithm)):
        return algorithm
    raise TypeError(
        f"an algorithm of lightning_accel.bagua.torch_api.algorithms is needed: got a {type(algorithm).__name__}. Write "
        "one that was made for Bagua itself anew, with lightning_accel.register_algorithm"
    )


def replica_of(module: nn.Module) -> Replica:
    """Returns the replica of a module that `with_bagua` or Bagua's DistributedDataParallel has returned.

    Raises:
        TypeError: If it is another module.
    """
    ddp = module if isinstance(module, AccelDataParallel) else module.__dict__.get("bagua_ddp")
    if not isinstance(ddp, AccelDataParallel):
        raise TypeError(f"a module from with_bagua or DistributedDataParallel is needed: got a {type(module).__name__}")
    return ddp.replica
