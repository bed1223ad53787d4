# mypy: disable-error-code="misc"
"""All of the strategy but its base class, so that it serves each Lightning root; it imports none."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch.distributed.constants import default_pg_timeout
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

import lightning_accel_autoload
from lightning_accel.algorithms import Algorithm, make_algorithm
from lightning_accel.background.statistics import Statistics
from lightning_accel.checkpoint import rank_files
from lightning_accel.checkpoint.agreement import together
from lightning_accel.checkpoint.state import KEY, Restored, State
from lightning_accel.data_parallel.replica import Replica
from lightning_accel.strategy.refusals import check_arguments, check_checkpoint_io, check_device, check_gradients_stay
from lightning_accel.strategy.sigterm import SigtermRelay

if TYPE_CHECKING:
    # Either root's DDPStrategy.
    _Base = Any
else:
    _Base = object


class AccelMixin(_Base):
    """Data-parallel training whose communication is chosen by one word.

    The model is wrapped in torch's DDP; the algorithm decides what travels.

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
        accelerator: as in DDPStrategy, and so the following, down to `start_method`.
        parallel_devices: devices of this node.
        cluster_environment: ranks and addresses.
        checkpoint_io: how checkpoints are written.
        precision_plugin: of the Trainer's precision.
        process_group_backend: "gloo", "nccl" or another backend of torch.distributed.
        timeout: of each collective; a failed peer is noticed at the latest after it.
        start_method: "popen", "spawn", "fork" or "forkserver".
        gradient_as_bucket_view: whether gradients lie in DDP's buckets, which spares a copy of them, in memory and in time;
            unlike in DDP on by default. Turn it off for code that calls `detach_()` on gradients.
        **kwargs: of torch's DistributedDataParallel, such as find_unused_parameters, bucket_cap_mb, static_graph.

    An option left at None has the algorithm's own default.

    Raises:
        ValueError: for an unknown algorithm or a wrong value.
        TypeError: for an unknown option or argument, with the valid ones.

    Example:
        >>> Trainer(strategy=AccelStrategy(algorithm="bytegrad", codec="int8"), devices=2)  # doctest: +SKIP
    """

    strategy_name = "accel"

    def __init__(
        self,
        algorithm: str | Algorithm = "gradient_allreduce",
        accelerator: Any = None,
        parallel_devices: list[torch.device] | None = None,
        cluster_environment: Any = None,
        checkpoint_io: Any = None,
        precision_plugin: Any = None,
        process_group_backend: str | None = None,
        timeout: timedelta | None = default_pg_timeout,
        start_method: Literal["popen", "spawn", "fork", "forkserver"] = "popen",
        gradient_as_bucket_view: bool = True,
        codec: str | None = None,
        error_feedback: bool | None = None,
        hierarchical: bool | Literal["auto"] | None = None,
        average: bool | None = None,
        peer_selection_mode: Literal["all", "shift_one"] | None = None,
        communication_interval: int | None = None,
        sync_interval_ms: int | None = None,
        warmup_steps: int | None = None,
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
        check_arguments(AccelMixin, kwargs, list(options))
        super().__init__(
            accelerator=accelerator,
            parallel_devices=parallel_devices,
            cluster_environment=cluster_environment,
            checkpoint_io=checkpoint_io,
            precision_plugin=precision_plugin,
            process_group_backend=process_group_backend,
            timeout=timeout,
            start_method=start_method,
            gradient_as_bucket_view=gradient_as_bucket_view,
            **kwargs,
        )
        self._algorithm = make_algorithm(algorithm, {name: value for name, value in options.items() if value is not None})
        self._replica: Replica | None = None
        self._sigterm: SigtermRelay | None = None
        self._restored: Restored | None = None
        self._final_state: State | None = None
        self._statistics = Statistics()

    @property
    def algorithm(self) -> Algorithm:
        """The algorithm's options."""
        return self._algorithm

    @property
    def statistics(self) -> Statistics:
        """What communication cost this rank in the fit that runs, or in the last one."""
        return self._replica.statistics if self._replica is not None else self._statistics

    def _configure_launcher(self) -> None:
        # The first moment that knows the device, before any process is started.
        check_device(self.root_device, "Trainer")
        super()._configure_launcher()

    def _register_ddp_hooks(self) -> None:
        # Lightning registers hooks on CUDA only; ours is what communicates, so always.
        assert isinstance(self.model, DistributedDataParallel)
        self._close_replica()
        self._replica = Replica(self.model, self._algorithm, timeout=self._timeout, node_name=f"node {self.node_rank}")

    def setup(self, trainer: Any) -> None:
        """Wraps the model, then lets the algorithm know the optimizers, which come last. Collective."""
        if not self._algorithm.keeps_gradients:
            check_gradients_stay(self._algorithm.name, trainer.gradient_clip_val, self.precision_plugin)
        super().setup(trainer)
        if self._replica is not None:
            self._replica.attach_optimizers(self.optimizers)
            check_checkpoint_io(self.checkpoint_io, self._state)
            if self._replica.algorithm.relays_termination and self.world_size > 1:
                self._sigterm = SigtermRelay(trainer, self._replica.algorithm, self._reach_consensus)

    def optimizer_step(
        self,
        optimizer: torch.optim.Optimizer,
        closure: Callable[[], Any],
        model: Any = None,
        **kwargs: Any,
    ) -> Any:
        """Steps; forward and backward run inside the closure, and the round ends right after them."""

        def closure_of_round() -> Any:
            output = closure()
            if self._replica is not None:
                self._replica.before_step()
            return output

        return super().optimizer_step(optimizer, closure_of_round, model, **kwargs)

    def on_validation_start(self) -> None:
        """Evaluates one model, equal on all ranks."""
        super().on_validation_start()
        self._reach_consensus()

    def on_test_start(self) -> None:
        """Evaluates one model, equal on all ranks."""
        super().on_test_start()
        self._reach_consensus()

    def on_predict_start(self) -> None:
        """Evaluates one model, equal on all ranks."""
        super().on_predict_start()
        self._reach_consensus()

    def on_train_end(self) -> None:
        """Leaves one model, equal on all ranks."""
        super().on_train_end()
        self._reach_consensus()

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Saves one model, equal on all ranks."""
        self._reach_consensus()
        state: dict[str, Any] = super().lightning_module_state_dict()
        return state

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """Adds the algorithm's state, which other strategies ignore, and writes what each rank holds for itself. Collective."""

        def write(part: dict[str, Any] | None = None) -> None:
            if part is not None:
                checkpoint[KEY] = part
            super(AccelMixin, self).save_checkpoint(checkpoint, filepath, storage_options)

        # After fit too: that is when users save.
        state = self._state() if self._replica is not None else self._final_state
        if self._is_interrupted:
            write(None if state is None else state.part(self.world_size))
        elif state is None or "optimizer_states" not in checkpoint:
            together(write, f"write {filepath}")  # nobody goes on from weights alone
        else:
            check_checkpoint_io(self.checkpoint_io, lambda: state)
            rank_files.save_checkpoint(filepath, state, self._entries_of_rank(checkpoint), write)

    def load_checkpoint(self, checkpoint_path: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Reads a checkpoint; for a fit, what this rank held for itself too, which waits until the rest is restored."""
        read: Callable[[], dict[str, Any]] = partial(super().load_checkpoint, checkpoint_path, *args, **kwargs)
        if self._trainer is None or self._trainer.state.fn != "fit":
            return read()
        checkpoint, self._restored = rank_files.load_checkpoint(checkpoint_path, read, self._algorithm.name, 1)
        return checkpoint

    def load_optimizer_state_dict(self, checkpoint: Any) -> None:
        """Restores the optimizers, and with them, as the last to be restored, the algorithm's state."""
        super().load_optimizer_state_dict(checkpoint)
        restored, self._restored = self._restored, None
        if restored is not None and self._replica is not None:
            restored.apply(self._algorithm.name, [self._replica])

    def remove_checkpoint(self, filepath: Any) -> None:
        """Removes a checkpoint, and the ranks' files."""
        super().remove_checkpoint(filepath)
        if self.is_global_zero:
            rank_files.remove_files(filepath)

    def barrier(self, *args: Any, **kwargs: Any) -> None:
        """Waits for all ranks; not while this one handles an exception, which the others may not have."""
        if not self._is_interrupted:
            self._before_collective()
            super().barrier(*args, **kwargs)

    def broadcast(self, obj: Any, src: int = 0) -> Any:
        """Gives all ranks one rank's object."""
        self._before_collective()
        return super().broadcast(obj, src)

    def reduce(self, tensor: Any, group: Any = None, reduce_op: Any = "mean") -> Any:
        """Reduces a tensor over all ranks; what is no tensor stays."""
        if isinstance(tensor, torch.Tensor):
            self._before_collective(group)
        return super().reduce(tensor, group, reduce_op)

    def all_gather(self, tensor: torch.Tensor, group: Any = None, sync_grads: bool = False) -> Any:
        """Gives all ranks every rank's tensor."""
        self._before_collective(group)
        return super().all_gather(tensor, group, sync_grads)

    def on_exception(self, exception: BaseException) -> None:
        """Puts our names in the advice that DDPStrategy adds to torch's errors."""
        super().on_exception(exception)
        exception.args = tuple(
            argument.replace("strategy='ddp_", "strategy='accel_").replace("DDPStrategy(", "AccelStrategy(")
            if isinstance(argument, str)
            else argument
            for argument in exception.args
        )

    def teardown(self) -> None:
        """Ends communication, then what DDPStrategy ends; idempotent, and tolerant of half a set-up."""
        try:
            self._close_replica()
        finally:
            if self._sigterm is not None:
                self._sigterm.end()
                self._sigterm = None
            self._restored = None  # by a validation, perhaps: the next fit may be another one
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
        """Whether this rank handles an exception; callbacks save then, on the failing rank alone: no collective."""
        trainer = self._trainer
        return trainer is not None and bool(trainer.state.status == "interrupted")

    def _reach_consensus(self) -> None:
        if self._replica is not None and not self._is_interrupted:
            self._find_averages(self._replica)
            self._replica.consensus()
            if self._sigterm is not None:
                self._sigterm.stop_if_terminating()

    def _before_collective(self, group: Any = None) -> None:
        """Before all ranks wait for each other in a callback or a log: one that is to end may not come there."""
        if group is not None and group is not torch.distributed.group.WORLD:
            return  # of some ranks, perhaps
        if self._sigterm is not None and self._replica is not None and not self._is_interrupted:
            self._find_averages(self._replica)
            if self._replica.algorithm.consensus_if_terminating():
                self._sigterm.stop_if_terminating()

    def _find_averages(self, replica: Replica) -> None:
        held = [value for callback in self._trainer.callbacks for value in vars(callback).values()]
        replica.algorithm.averages = [value for value in held if isinstance(value, AveragedModel)]

    def _state(self) -> State:
        assert self._replica is not None
        return State.of(self._algorithm.name, [self._replica])

    def _entries_of_rank(self, checkpoint: dict[str, Any]) -> dict[str, Any]:
        """What follows from weights, where they differ between ranks: this rank's optimizers, schedulers and scaler."""
        names = ("optimizer_states", "lr_schedulers", type(self.precision_plugin).__qualname__)
        return {name: checkpoint[name] for name in names if name in checkpoint}

    def _close_replica(self) -> None:
        replica, self._replica = self._replica, None
        if replica is not None:
            self._statistics = replica.statistics
            self._final_state = None
            try:
                if not self._is_interrupted:
                    state = State.of(self._algorithm.name, [replica])
                    own = apply_to_collection(state.own, torch.Tensor, torch.Tensor.cpu)  # until the next fit, perhaps
                    self._final_state = replace(state, own=own)
            finally:
                replica.close()
