"""Attaches an algorithm to a DDP instance and calls its hooks; for plain PyTorch and under the strategy alike."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from datetime import timedelta
from functools import partial
from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel

from lightning_accel.algorithms.base import Algorithm, BoundAlgorithm, Context, Parameters
from lightning_accel.background.communicator import Communicator
from lightning_accel.background.statistics import Statistics
from lightning_accel.data_parallel.ddp_hook import DDPHook
from lightning_accel.data_parallel.device_kernels import check_kernels
from lightning_accel.data_parallel.frozen_weights import FrozenWeights
from lightning_accel.data_parallel.rounds import Rounds
from lightning_accel.data_parallel.unused_parameters import check_reduction
from lightning_accel.transport.topology import discover


class Replica:
    """One rank's model in training: a DDP instance, and the algorithm that communicates for it.

    Collective: all ranks of the DDP's process group make and close it in the same order, and call `consensus`, `pause` and
    `resume` alike. An algorithm that takes whole buckets can be attached to a DDP instance once, as DDP keeps its hook.

    Args:
        ddp: Wrapped model, not yet trained, without a communication hook.
        algorithm: Options of the algorithm.
        optimizers: Optimizers whose steps end a round, in plain PyTorch. The strategy gives none and calls `before_step` itself.
        timeout: Timeout of a collective; None takes that of the process group.
        node_name: Name of the machine this process runs on; None asks `lightning_accel.environment`.

    Raises:
        RuntimeError: On all ranks, if the algorithm needs kernels that are not there for the device of any of them.

    Example:
        >>> ddp = DistributedDataParallel(model)  # doctest: +SKIP
        >>> replica = Replica(ddp, ByteGrad(), optimizers=[optimizer])  # doctest: +SKIP
    """

    unused_parameters_remedy = "DistributedDataParallel(..., find_unused_parameters=True)"
    """What users write to let DDP detect unused parameters; for a message."""

    def __init__(
        self,
        ddp: DistributedDataParallel,
        algorithm: Algorithm,
        optimizers: Iterable[torch.optim.Optimizer] = (),
        *,
        timeout: timedelta | None = None,
        node_name: str | None = None,
    ) -> None:
        parameters = Parameters.of(ddp.module)
        device = next((p.device for p in parameters.tensors if p.requires_grad), torch.device("cpu"))
        topology = discover(ddp.process_group, node_name)
        check_kernels(algorithm, topology, ddp.process_group, device)
        self.communicator = Communicator(algorithm.name, ddp.process_group, device, timeout, topology)
        try:
            self._attach(Context(ddp, parameters, self.communicator), algorithm, list(optimizers))
        except BaseException:
            self.communicator.close()  # a thread that was started would stay
            raise

    def _attach(self, context: Context, algorithm: Algorithm, optimizers: list[torch.optim.Optimizer]) -> None:
        self.algorithm: BoundAlgorithm = algorithm.bind(context)
        self._rounds = Rounds(steps_end_rounds=bool(optimizers))
        self._hook = DDPHook(context.ddp, self.algorithm, self._rounds.reduce)
        self._frozen = FrozenWeights(context)
        self._optimizers: list[torch.optim.Optimizer] = []
        self._is_closed = False
        self._may_differ = False
        # Kept out of what torch.compile traces: the algorithm's hooks are side effects.
        forward_hook = torch.compiler.disable(self._before_forward)  # type: ignore[no-untyped-call]
        self._handles: list[Any] = [context.ddp.register_forward_pre_hook(forward_hook)]
        # Weak, as DDP's reference to the hook is: optimizers outlive replicas.
        step_hook = partial(_before_optimizer_step, weakref.ref(self))
        self._handles += [optimizer.register_step_pre_hook(step_hook) for optimizer in optimizers]
        if optimizers:
            self.attach_optimizers(optimizers)

    def attach_optimizers(self, optimizers: Iterable[torch.optim.Optimizer]) -> None:
        """Tells the algorithm of the optimizers, and later of their steps. Called before the first forward.

        The constructor does it for those that it gets; a strategy, whose optimizers come later, calls this.
        """
        optimizers = list(optimizers)
        hook = partial(_after_optimizer_step, weakref.ref(self))
        self._handles += [optimizer.register_step_post_hook(hook) for optimizer in optimizers]
        self._optimizers = optimizers
        self.algorithm.attach_optimizers(optimizers)

    @property
    def rounds(self) -> int:
        """Number of rounds finished so far."""
        return self._rounds.finished

    @property
    def hook_ids(self) -> set[int]:
        """Ids of this object's hooks on the DDP instance's forward; those of others are not among them."""
        return {handle.id for handle in self._handles}

    @property
    def statistics(self) -> Statistics:
        """What communication cost this rank so far."""
        return self.communicator.statistics

    def before_step(self) -> None:
        """Ends the round: gradients are complete, the optimizer has not stepped yet. Does nothing outside a round.

        Raises:
            RuntimeError: if a weight that was frozen at first has a gradient now, which the optimizer would use. In plain PyTorch
                with a closure, whose backward comes after this, one step later.
        """
        self._may_differ = self.algorithm.ranks_differ
        if self._rounds.end():
            if self.communicator.world_size > 1:
                self._frozen.refuse_gradients(self._optimizers)
            self.algorithm.before_step()

    def consensus(self) -> None:
        """Makes all ranks' weights equal. Collective; does nothing after a `close` that has left them equal.

        Raises:
            RuntimeError: if they may differ and communication has ended, or has failed.
        """
        if not self._is_closed:
            self._end_skipped_round()
            self.algorithm.consensus()
            self.communicator.settle()
            self._may_differ = False
        elif self._may_differ:
            raise RuntimeError(
                f"{self.communicator.name}: weights may differ between ranks, and communication was closed before a consensus, "
                "by an exception perhaps. Wrap the model anew (all ranks get rank 0's), or take it as it is: ddp.module"
            )

    def pause(self) -> None:
        """Stops communication that runs by itself. Collective and idempotent; does nothing after `close`."""
        if not self._is_closed:
            self.algorithm.pause()

    def resume(self) -> None:
        """Starts it again. Collective and idempotent; does nothing after `close`."""
        if not self._is_closed:
            self.algorithm.resume()

    def state_dict(self) -> dict[str, Any]:
        """Returns the counter and the algorithm's state, as tensors, numbers, strings, lists and dicts."""
        return {"rounds": self.rounds, "algorithm": self.algorithm.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what `state_dict` returned, and drops an open round."""
        self._rounds.restore(int(state["rounds"]))
        self.algorithm.load_state_dict(state["algorithm"])

    def close(self) -> None:
        """Ends communication. Idempotent and bounded in time, after a failure too.

        Later backward passes keep local gradients, as DDP keeps its hook; where the algorithm let DDP divide, plain DDP is left.
        """
        if self._is_closed:
            return
        self._is_closed = True
        for handle in self._handles:
            handle.remove()
        self._hook.detach()
        try:
            self.algorithm.teardown()
        finally:
            self.communicator.close()

    def _before_forward(self, module: DistributedDataParallel, arguments: Any) -> None:
        if not torch.is_grad_enabled() or self._is_closed:
            return
        if module._join_config.enable:
            raise RuntimeError(
                "DistributedDataParallel.join() cannot be used with an algorithm: a rank without data would answer DDP's own "
                "all_reduces, not the algorithm's. Give all ranks equally many batches (drop_last=True)."
            )
        self._hook.before_forward(module)
        self.communicator.check()
        check_reduction(module, self.unused_parameters_remedy)
        self._end_skipped_round()
        if self._rounds.begin():
            self.algorithm.before_forward()

    def _end_skipped_round(self) -> None:
        if self._rounds.is_skipped:
            self.before_step()


def _before_optimizer_step(reference: Callable[[], Replica | None], *arguments: Any) -> None:
    if (replica := reference()) is not None:
        replica.before_step()


def _after_optimizer_step(reference: Callable[[], Replica | None], optimizer: torch.optim.Optimizer, *arguments: Any) -> None:
    if (replica := reference()) is not None and not replica._is_closed:
        replica.algorithm.after_step(optimizer)
