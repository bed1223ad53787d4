# mypy: disable-error-code="misc"
"""Fabric's strategy without its base class, so that it serves each Lightning root; it imports none."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

import lightning_accel_autoload
from lightning_accel.algorithms import Algorithm
from lightning_accel.checkpoint.state import KEY
from lightning_accel.data_parallel.replica import Replica
from lightning_accel.data_parallel.same_model import check_same_model
from lightning_accel.data_parallel.wrap import check_whole
from lightning_accel.strategy.advice import respell
from lightning_accel.strategy.checkpoint_io import WholeFiles
from lightning_accel.strategy.checkpoints import Checkpoints, already_read
from lightning_accel.strategy.joining import join
from lightning_accel.strategy.options import split_keywords
from lightning_accel.strategy.refusals import check_device, check_gradients_stay, check_interactive

if TYPE_CHECKING:
    # Either root's DDPStrategy.
    _Base = Any
else:
    _Base = object


class FabricStrategy(WholeFiles, _Base):
    """Fabric's data-parallel training whose communication is chosen by one word.

    Each module that `fabric.setup` gets is wrapped in torch's DDP, with the algorithm attached; `fabric.no_backward_sync`
    accumulates. The algorithm's state travels in the checkpoints of `fabric.save` and `fabric.load`. An option left at None has
    the algorithm's default.

    Args:
        algorithm: Name of a registered algorithm, such as "bytegrad", or an `Algorithm` object.
        **kwargs: Options of the algorithm and of checkpoints, arguments of DDPStrategy and of torch's DistributedDataParallel.

    Raises:
        ValueError: For an unknown algorithm or a wrong value.
        TypeError: For an unknown option or argument, with the valid ones.

    Example:
        >>> Fabric(strategy=AccelStrategy(algorithm="bytegrad"), devices=2)  # doctest: +SKIP
    """

    registered_name: str | None = None
    """Name that the user gave instead of an object, such as "accel_bytegrad_spawn"."""

    def __init__(self, algorithm: str | Algorithm = "gradient_allreduce", **kwargs: Any) -> None:
        chosen, checkpoint_options, base_kwargs = split_keywords(super().__init__, algorithm, kwargs)
        super().__init__(**base_kwargs)
        self.keywords = {"algorithm": algorithm, **kwargs}
        self._algorithm = chosen
        self._checkpoints = Checkpoints(chosen.name, checkpoint_options)
        self._replicas: list[tuple[DistributedDataParallel, Replica]] = []

    @property
    def algorithm(self) -> Algorithm:
        """The algorithm, with its options."""
        return self._algorithm

    @property
    def replicas(self) -> list[Replica]:
        """The replica of each module, in the order of set-up; it counts bytes and seconds (`statistics`)."""
        return [replica for _, replica in self._replicas]

    def setup_module(self, module: torch.nn.Module) -> DistributedDataParallel:
        """Wraps the module in DDP and attaches the algorithm. Collective."""
        if not self._algorithm.keeps_gradients:
            check_gradients_stay(self._algorithm.name, None, self.precision)
        check_whole(module)
        check_same_model(self._algorithm.name, module, self._ddp_kwargs)
        ddp: DistributedDataParallel = super().setup_module(module)
        replica = Replica(ddp, self._algorithm, timeout=self._timeout, node_name=f"node {self.node_rank}")
        replica.unused_parameters_remedy = f"Fabric(strategy={respell(self, {self._algorithm.unused_parameters_argument: True})})"
        self._replicas.append((ddp, replica))
        return ddp

    def setup_optimizer(self, optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
        """Tells the optimizer to the algorithm of each module whose parameters it holds."""
        optimizer = super().setup_optimizer(optimizer)
        for replica in self._replicas_of(optimizer):
            replica.attach_optimizers([optimizer])
        return optimizer

    def optimizer_step(self, optimizer: torch.optim.Optimizer, **kwargs: Any) -> Any:
        """Steps the optimizer, after ending the round of each module whose parameters it holds."""
        replicas = list(self._replicas_of(optimizer))
        closure: Callable[[], Any] | None = kwargs.pop("closure", None)

        def closure_of_round() -> Any:
            output = closure() if closure is not None else None
            for replica in replicas:
                replica.before_step()
            return output

        if closure is not None:
            return super().optimizer_step(optimizer, closure=closure_of_round, **kwargs)
        closure_of_round()
        return super().optimizer_step(optimizer, **kwargs)

    def clip_gradients_norm(self, module: torch.nn.Module, optimizer: Any, max_norm: Any, *args: Any, **kwargs: Any) -> Any:
        """Clips as Fabric does; refused for an algorithm that leaves something else in `.grad`."""
        if not self._algorithm.keeps_gradients:
            check_gradients_stay(self._algorithm.name, max_norm, self.precision)
        return super().clip_gradients_norm(module, optimizer, max_norm, *args, **kwargs)

    def clip_gradients_value(self, module: torch.nn.Module, optimizer: Any, clip_val: Any) -> None:
        """Clips as Fabric does; refused for an algorithm that leaves something else in `.grad`."""
        if not self._algorithm.keeps_gradients:
            check_gradients_stay(self._algorithm.name, clip_val, self.precision)
        super().clip_gradients_value(module, optimizer, clip_val)

    def consensus(self) -> None:
        """Makes all ranks' weights equal, as evaluation needs them and saving does by itself. Collective."""
        for replica in self.replicas:
            replica.consensus()

    def save_checkpoint(self, path: Any, state: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        """Saves one model, equal on all ranks, and adds the algorithm's state, which other strategies ignore.

        Collective. Where the algorithm lets weights differ between ranks, each rank's optimizers and schedulers are saved.
        """
        self.consensus()
        save = super().save_checkpoint
        entries = {name: value.state_dict() for name, value in state.items() if isinstance(value, Optimizer | LRScheduler)}

        def write(path: str, part: dict[str, Any]) -> None:
            save(path, {**state, KEY: part}, *args, **kwargs)

        self._checkpoints.save(path, self._checkpoints.state(self.replicas), entries, self.checkpoint_io, write)

    def load_checkpoint(self, path: Any, state: Any = None, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Restores what `state` names, the algorithm's state and the random generators.

        Collective if `state` is a dict, or if it is a module that shares weights with one that was set up (`fabric.load_raw`).
        """
        load: Callable[..., dict[str, Any]] = super().load_checkpoint
        if isinstance(state, torch.nn.Module):
            replicas = [replica for ddp, replica in self._replicas if _share_weights(ddp, state)]
            for replica in replicas:
                replica.consensus()  # ends what is in flight
            loaded = load(path, state, *args, **kwargs)
            for replica in replicas:
                replica.consensus()  # the algorithm starts anew from these weights
            return loaded
        if not isinstance(state, dict) or not state:
            return load(path, state, *args, **kwargs)
        checkpoint = self._checkpoints.load(path, lambda path: load(path, None, *args, **kwargs), len(self._replicas))
        checkpoint.pop(KEY, None)
        self.consensus()  # ends what is in flight
        with already_read(self, checkpoint):
            rest = load(path, state, *args, **kwargs)
        if not self._checkpoints.restore(self.replicas):
            self.consensus()  # the algorithm starts anew from these weights
        return rest

    def teardown(self) -> None:
        """Ends communication, then what DDPStrategy ends. Idempotent."""
        while self._replicas:
            self._replicas.pop()[1].close()
        super().teardown()

    @classmethod
    def register_strategies(cls, strategy_registry: Any) -> None:
        """Registers `accel` and its variants in a root's registry."""
        lightning_accel_autoload.register(strategy_registry, cls.__module__)

    def _configure_launcher(self) -> None:
        # Fabric knows the device from here on, and has not started any process yet.
        check_device(self.root_device, "Fabric")
        super()._configure_launcher()
        if self._start_method != "popen":
            self._launcher = self.launcher_of_processes(self, start_method=self._start_method)
        check_interactive(self, "Fabric")

    def _setup_distributed(self) -> None:
        self._set_world_ranks()
        join(self)
        super()._setup_distributed()

    def _replicas_of(self, optimizer: torch.optim.Optimizer) -> Iterator[Replica]:
        stepped = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        for ddp, replica in self._replicas:
            if any(id(parameter) in stepped for parameter in ddp.module.parameters()):
                yield replica


def _share_weights(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    return not {id(parameter) for parameter in one.parameters()}.isdisjoint(id(parameter) for parameter in other.parameters())
