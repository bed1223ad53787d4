# mypy: disable-error-code="misc"
"""The Trainer's strategy without its base class, so that it serves each Lightning root; it imports none."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

import lightning_accel_autoload
from lightning_accel.algorithms import Algorithm
from lightning_accel.background.statistics import Statistics
from lightning_accel.checkpoint.agreement import of_first_rank, raise_together
from lightning_accel.checkpoint.rank_files import remove_rank_files
from lightning_accel.checkpoint.state import KEY, State
from lightning_accel.data_parallel.replica import Replica
from lightning_accel.data_parallel.same_model import check_same_model
from lightning_accel.data_parallel.wrap import check_whole
from lightning_accel.strategy.advice import respell
from lightning_accel.strategy.checkpoint_io import WholeFiles
from lightning_accel.strategy.checkpoints import Checkpoints
from lightning_accel.strategy.joining import join
from lightning_accel.strategy.options import split_keywords
from lightning_accel.strategy.refusals import check_device, check_gradients_stay, check_interactive
from lightning_accel.strategy.sigterm import SigtermRelay

if TYPE_CHECKING:
    # Either root's DDPStrategy.
    _Base = Any
else:
    _Base = object


class TrainerStrategy(WholeFiles, _Base):
    """Data-parallel training whose communication is chosen by one word.

    The model is wrapped in torch's DDP; the algorithm decides what travels. An option left at None has the algorithm's default.

    Args:
        algorithm: Name of a registered algorithm, such as "bytegrad", or an `Algorithm` object.
        **kwargs: Options of the algorithm and of checkpoints, arguments of DDPStrategy and of torch's DistributedDataParallel.

    Raises:
        ValueError: For an unknown algorithm or a wrong value.
        TypeError: For an unknown option or argument, with the valid ones.

    Example:
        >>> Trainer(strategy=AccelStrategy(algorithm="bytegrad", codec="int8"), devices=2)  # doctest: +SKIP
    """

    strategy_name = "accel"

    registered_name: str | None = None
    """Name that the user gave instead of an object, such as "accel_bytegrad_spawn"."""

    def __init__(self, algorithm: str | Algorithm = "gradient_allreduce", **kwargs: Any) -> None:
        chosen, checkpoint_options, base_kwargs = split_keywords(super().__init__, algorithm, kwargs)
        super().__init__(**base_kwargs)
        self.keywords = {"algorithm": algorithm, **kwargs}
        self._algorithm = chosen
        self._checkpoints = Checkpoints(chosen.name, checkpoint_options)
        self._replica: Replica | None = None
        self._sigterm: SigtermRelay | None = None
        self._statistics = Statistics()

    @property
    def algorithm(self) -> Algorithm:
        """The algorithm, with its options."""
        return self._algorithm

    @property
    def statistics(self) -> Statistics:
        """What communication cost this rank in the current fit, or in the last one; rank 0 after spawned or forked processes."""
        return self._replica.statistics if self._replica is not None else self._statistics

    @statistics.setter
    def statistics(self, statistics: Statistics) -> None:
        self._statistics = statistics

    def _configure_launcher(self) -> None:
        # Lightning knows the device from here on, and has not started any process yet.
        check_device(self.root_device, "Trainer")
        super()._configure_launcher()
        if self._start_method != "popen":
            self._launcher = self.launcher_of_processes(self, start_method=self._start_method)
        check_interactive(self, "Trainer")

    def setup_distributed(self) -> None:
        """Joins the other ranks. Collective."""
        self.set_world_ranks()
        join(self)
        super().setup_distributed()

    def _register_ddp_hooks(self) -> None:
        # Lightning registers hooks on CUDA only; ours communicates, so it is registered always.
        assert isinstance(self.model, DistributedDataParallel)
        self._close_replica()
        self._replica = Replica(self.model, self._algorithm, timeout=self._timeout, node_name=f"node {self.node_rank}")
        self._replica.unused_parameters_remedy = (
            f"Trainer(strategy={respell(self, {self._algorithm.unused_parameters_argument: True})})"
        )

    def _setup_model(self, model: torch.nn.Module) -> DistributedDataParallel:
        check_whole(model)
        check_same_model(self._algorithm.name, model, self._ddp_kwargs)
        ddp: DistributedDataParallel = super()._setup_model(model)
        return ddp

    def setup(self, trainer: Any) -> None:
        """Wraps the model, then tells the algorithm the optimizers, which exist only now. Collective."""
        if not self._algorithm.keeps_gradients:
            check_gradients_stay(self._algorithm.name, trainer.gradient_clip_val, self.precision_plugin)
        super().setup(trainer)
        if self._replica is not None:
            self._replica.attach_optimizers(self.optimizers)
            self._checkpoints.check_writer(self.checkpoint_io)
            if self._replica.algorithm.relays_termination and self.world_size > 1:
                self._sigterm = SigtermRelay(trainer, self._replica.algorithm, self._reach_consensus)

    def optimizer_step(
        self,
        optimizer: torch.optim.Optimizer,
        closure: Callable[[], Any],
        model: Any = None,
        **kwargs: Any,
    ) -> Any:
        """Steps the optimizer; forward and backward run inside the closure, and the round ends right after them."""

        def closure_of_round() -> Any:
            output = closure()
            if self._replica is not None:
                self._replica.before_step()
            return output

        return super().optimizer_step(optimizer, closure_of_round, model, **kwargs)

    def on_validation_start(self) -> None:
        """Makes all ranks' weights equal, so that one model is evaluated. Collective."""
        super().on_validation_start()
        self._reach_consensus()

    def on_test_start(self) -> None:
        """Makes all ranks' weights equal, so that one model is evaluated. Collective."""
        super().on_test_start()
        self._reach_consensus()

    def on_predict_start(self) -> None:
        """Makes all ranks' weights equal, so that one model is evaluated. Collective."""
        super().on_predict_start()
        self._reach_consensus()

    def on_train_end(self) -> None:
        """Makes all ranks' weights equal, so that one model is left. Collective."""
        super().on_train_end()
        self._reach_consensus()

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Returns the state of one model, equal on all ranks. Collective."""
        self._reach_consensus()
        state: dict[str, Any] = super().lightning_module_state_dict()
        return state

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """Adds the algorithm's state, which other strategies ignore, and writes what each rank holds for itself. Collective."""
        save = super().save_checkpoint

        def write(path: Any = filepath, part: dict[str, Any] | None = None) -> None:
            if part is not None:
                checkpoint[KEY] = part
            save(checkpoint, path, storage_options)

        # After the fit, when there is no replica, too: that is when users save.
        state = self._state() if self._replica is not None else self._checkpoints.final_state
        if self._is_interrupted:
            write(part=None if state is None else state.part(self.world_size))
        elif state is None or "optimizer_states" not in checkpoint:
            raise_together(write, f"write {filepath}")  # nobody resumes from weights alone
        else:
            # What follows from weights: each rank's own where weights differ.
            names = ("optimizer_states", "lr_schedulers", type(self.precision_plugin).__qualname__)
            entries = {name: checkpoint[name] for name in names if name in checkpoint}
            self._checkpoints.save(filepath, state, entries, self.checkpoint_io, write)

    def load_checkpoint(self, checkpoint_path: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Reads a checkpoint, and for a fit what this rank held for itself, which is restored after all the rest."""
        load: Callable[..., dict[str, Any]] = super().load_checkpoint

        def read(path: Any) -> dict[str, Any]:
            return load(path, *args, **kwargs)

        if self._trainer is None or self._trainer.state.fn != "fit":
            return read(of_first_rank(checkpoint_path, None))
        return self._checkpoints.load(checkpoint_path, read, 1)

    def load_optimizer_state_dict(self, checkpoint: Any) -> None:
        """Restores the optimizers, and then, since nothing is restored after them, the algorithm's state."""
        super().load_optimizer_state_dict(checkpoint)
        if self._replica is not None:
            self._checkpoints.restore([self._replica])

    def remove_checkpoint(self, filepath: Any) -> None:
        """Removes a checkpoint and the ranks' files."""
        super().remove_checkpoint(filepath)
        if self.is_global_zero:
            remove_rank_files(os.fspath(filepath))

    def barrier(self, *args: Any, **kwargs: Any) -> None:
        """Waits for all ranks, unless this one handles an exception, which the others may not have."""
        if not self._is_interrupted:
            self._before_collective()
            super().barrier(*args, **kwargs)

    def broadcast(self, obj: Any, src: int = 0) -> Any:
        """Sends one rank's object to all ranks."""
        self._before_collective()
        return super().broadcast(obj, src)

    def reduce(self, tensor: Any, group: Any = None, reduce_op: Any = "mean") -> Any:
        """Reduces a tensor over all ranks; anything else is returned as it is."""
        if isinstance(tensor, torch.Tensor):
            self._before_collective(group)
        return super().reduce(tensor, group, reduce_op)

    def all_gather(self, tensor: torch.Tensor, group: Any = None, sync_grads: bool = False) -> Any:
        """Gathers every rank's tensor on all ranks."""
        self._before_collective(group)
        return super().all_gather(tensor, group, sync_grads)

    def teardown(self) -> None:
        """Ends communication, then what DDPStrategy ends. Idempotent, also after half a set-up."""
        try:
            self._close_replica()
        finally:
            if self._sigterm is not None:
                self._sigterm.end()
                self._sigterm = None
            self._checkpoints.forget()
            super().teardown()

    @classmethod
    def register_strategies(cls, strategy_registry: Any) -> None:
        """Registers `accel` and its variants in a root's registry."""
        lightning_accel_autoload.register(strategy_registry, cls.__module__)

    @property
    def _trainer(self) -> Any:
        module = self.lightning_module
        return module._trainer if module is not None else None

    @property
    def _is_interrupted(self) -> bool:
        """Whether this rank handles an exception; callbacks then save on the failing rank alone, so no collective is allowed."""
        trainer = self._trainer
        return trainer is not None and bool(trainer.state.status == "interrupted")

    def _reach_consensus(self) -> None:
        if self._replica is not None and not self._is_interrupted:
            self._find_averages(self._replica)
            self._replica.consensus()
            if self._sigterm is not None:
                self._sigterm.stop_if_terminating()

    def _before_collective(self, group: Any = None) -> None:
        """Agrees on a termination before a callback's or a log's collective, which a rank that ends would never reach."""
        if group is not None and group is not torch.distributed.group.WORLD:
            return  # a group of some ranks, perhaps
        if self._sigterm is not None and self._replica is not None and not self._is_interrupted:
            self._find_averages(self._replica)
            if self._replica.algorithm.consensus_if_terminating():
                self._sigterm.stop_if_terminating()

    def _find_averages(self, replica: Replica) -> None:
        held = [value for callback in self._trainer.callbacks for value in vars(callback).values()]
        replica.algorithm.averages = [value for value in held if isinstance(value, AveragedModel)]

    def _state(self) -> State:
        assert self._replica is not None
        return self._checkpoints.state([self._replica])

    def _close_replica(self) -> None:
        replica, self._replica = self._replica, None
        if replica is not None:
            self._statistics = replica.statistics
            self._checkpoints.final_state = None
            try:
                if not self._is_interrupted:
                    self._checkpoints.keep_final_state([replica])
            finally:
                replica.close()
