# mypy: disable-error-code="misc"
"""All of Fabric's strategy but its base class, so that it serves each Lightning root; it imports none."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

import lightning_accel_autoload
from lightning_accel.algorithms import Algorithm, make_algorithm
from lightning_accel.checkpoint import rank_files
from lightning_accel.checkpoint.state import KEY, State
from lightning_accel.data_parallel.replica import Replica
from lightning_accel.strategy.refusals import check_arguments, check_checkpoint_io, check_device, check_gradients_stay

if TYPE_CHECKING:
    # Either root's DDPStrategy.
    _Base = Any
else:
    _Base = object


class FabricAccelMixin(_Base):
    """Fabric's data-parallel training whose communication is chosen by one word.

    Each module that `fabric.setup` gets is wrapped in torch's DDP, with the algorithm attached; `fabric.no_backward_sync`
    accumulates. Its state travels in the checkpoints of `fabric.save` and `fabric.load`.

    Args:
        algorithm: "gradient_allreduce", "bytegrad", "qadam", "decentralized", "low_precision_decentralized", "async",
            another registered name, or an `Algorithm` object.
        codec: bytegrad, qadam, low_precision_decentralized: "int8" (default), "minmax_uint8", "int4", "sign", "fp16", "bf16" or
            "none".
        error_feedback: bytegrad, qadam: whether what codes lose is kept and sent later; by default in qadam, in bytegrad for
            int4 and sign.
        hierarchical: whether ranks of a node sum first: True, False or "auto"; each algorithm's class says its default.
        average: the mean of gradients (default) or, with False, their sum.
        peer_selection_mode: decentralized: "all" (default) or "shift_one".
        communication_interval: decentralized, low_precision_decentralized: rounds from one exchange to the next; default 1.
        sync_interval_ms: async: milliseconds between averagings.
        warmup_steps: async: rounds that reduce gradients at first. (QAdam's warm-up belongs to its optimizer.)
        gradient_as_bucket_view: whether gradients lie in DDP's buckets, which spares a copy of them; on by default.
        **kwargs: of Fabric's DDPStrategy, such as process_group_backend, timeout, start_method, and of torch's
            DistributedDataParallel, such as find_unused_parameters, bucket_cap_mb, static_graph.

    Raises:
        ValueError: for an unknown algorithm or a wrong value.
        TypeError: for an unknown option or argument, with the valid ones.

    Example:
        >>> Fabric(strategy=AccelStrategy(algorithm="bytegrad"), devices=2)  # doctest: +SKIP
    """

    def __init__(
        self,
        algorithm: str | Algorithm = "gradient_allreduce",
        codec: str | None = None,
        error_feedback: bool | None = None,
        hierarchical: bool | Literal["auto"] | None = None,
        average: bool | None = None,
        peer_selection_mode: Literal["all", "shift_one"] | None = None,
        communication_interval: int | None = None,
        sync_interval_ms: int | None = None,
        warmup_steps: int | None = None,
        gradient_as_bucket_view: bool = True,
        **kwargs: Any,
    ) -> None:
        options = {
            "codec": codec,
            "error_feedback": error_feedback,
            "hierarchical": hierarchical,
            "average": average,
            "peer_selection_mode": peer_selection_mode,
            "communication_interval": communication_interval,
            "sync_interval_ms": sync_interval_ms,
            "warmup_steps": warmup_steps,
        }
        of_base = inspect.signature(super().__init__).parameters
        check_arguments(FabricAccelMixin, {name: value for name, value in kwargs.items() if name not in of_base}, list(options))
        super().__init__(gradient_as_bucket_view=gradient_as_bucket_view, **kwargs)
        self._algorithm = make_algorithm(algorithm, {name: value for name, value in options.items() if value is not None})
        self._replicas: list[tuple[DistributedDataParallel, Replica]] = []

    @property
    def algorithm(self) -> Algorithm:
        """The algorithm's options."""
        return self._algorithm

    @property
    def replicas(self) -> list[Replica]:
        """One for each module that was set up, in that order; they count bytes and seconds (`statistics`)."""
        return [replica for _, replica in self._replicas]

    def setup_module(self, module: torch.nn.Module) -> DistributedDataParallel:
        """Wraps the module in DDP and attaches the algorithm. Collective."""
        if not self._algorithm.keeps_gradients:
            check_gradients_stay(self._algorithm.name, None, self.precision)
        ddp: DistributedDataParallel = super().setup_module(module)
        self._replicas.append((ddp, Replica(ddp, self._algorithm, timeout=self._timeout, node_name=f"node {self.node_rank}")))
        return ddp

    def setup_optimizer(self, optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
        """Lets the algorithm of the modules whose parameters it holds know the optimizer."""
        made: torch.optim.Optimizer = super().setup_optimizer(optimizer)
        for replica in self._replicas_of(made):
            replica.attach_optimizers([made])
        return made

    def optimizer_step(self, optimizer: torch.optim.Optimizer, **kwargs: Any) -> Any:
        """Steps; the round of the modules whose parameters the optimizer holds ends before."""
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
        """As in Fabric; refused for algorithms that leave something else in `.grad`."""
        if not self._algorithm.keeps_gradients:
            check_gradients_stay(self._algorithm.name, max_norm, self.precision)
        return super().clip_gradients_norm(module, optimizer, max_norm, *args, **kwargs)

    def clip_gradients_value(self, module: torch.nn.Module, optimizer: Any, clip_val: Any) -> None:
        """As in Fabric; refused for algorithms that leave something else in `.grad`."""
        if not self._algorithm.keeps_gradients:
            check_gradients_stay(self._algorithm.name, clip_val, self.precision)
        super().clip_gradients_value(module, optimizer, clip_val)

    def consensus(self) -> None:
        """Makes all ranks' weights equal, for evaluation. Collective. Saving does it by itself."""
        for replica in self.replicas:
            replica.consensus()

    def save_checkpoint(self, path: Any, state: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        """Saves one model, equal on all ranks, and adds the algorithm's state, which other strategies ignore.

        Collective. Where the algorithm lets weights differ between ranks, each rank's optimizers and schedulers are saved.
        """
        self.consensus()
        ours = State.of(self._algorithm.name, self.replicas)
        check_checkpoint_io(self.checkpoint_io, lambda: ours)
        entries = {name: value.state_dict() for name, value in state.items() if isinstance(value, Optimizer | LRScheduler)}

        def write(part: dict[str, Any]) -> None:
            super(FabricAccelMixin, self).save_checkpoint(path, {**state, KEY: part}, *args, **kwargs)

        rank_files.save_checkpoint(path, ours, entries, write)

    def load_checkpoint(self, path: Any, state: Any = None, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Restores what `state` names, the algorithm's state and the random generators.

        Collective, if `state` is a dict, or (`fabric.load_raw`) a module with weights of one that was set up.
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
        checkpoint, restored = rank_files.load_checkpoint(
            path, lambda: load(path, None, *args, **kwargs), self._algorithm.name, len(self._replicas)
        )
        checkpoint.pop(KEY, None)
        self.consensus()  # ends what is in flight
        with _already_read(self, checkpoint):
            rest = load(path, state, *args, **kwargs)
        if restored is None or not restored.apply(self._algorithm.name, self.replicas):
            self.consensus()  # the algorithm starts anew from these weights
        return rest

    def teardown(self) -> None:
        """Ends communication, then what DDPStrategy ends; idempotent."""
        while self._replicas:
            self._replicas.pop()[1].close()
        super().teardown()

    @classmethod
    def register_strategies(cls, strategy_registry: Any) -> None:
        """Registers `accel` and its variants in a root's registry."""
        lightning_accel_autoload.register(strategy_registry, cls.__module__)

    def _configure_launcher(self) -> None:
        # The first moment that knows the device, before any process is started.
        check_device(self.root_device, "Fabric")
        super()._configure_launcher()

    def _replicas_of(self, optimizer: torch.optim.Optimizer) -> Iterator[Replica]:
        stepped = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        for ddp, replica in self._replicas:
            if any(id(parameter) in stepped for parameter in ddp.module.parameters()):
                yield replica


def _share_weights(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    return not {id(parameter) for parameter in one.parameters()}.isdisjoint(id(parameter) for parameter in other.parameters())


@contextmanager
def _already_read(strategy: Any, checkpoint: dict[str, Any]) -> Iterator[None]:
    """Gives the strategy this checkpoint, whatever it reads."""
    checkpoint_io = strategy.checkpoint_io
    strategy.checkpoint_io = SimpleNamespace(load_checkpoint=lambda *arguments, **options: checkpoint)
    try:
        yield
    finally:
        strategy.checkpoint_io = checkpoint_io
