"""Attaches an algorithm to a DDP instance and calls it at the right moments; for plain PyTorch and under the strategy alike.

A *round* is what leads to one optimizer step. It runs from the first forward with gradients to the first `before_step` after
it; a second optimizer's step in the same round sees nothing new. Rounds, not optimizer steps, are counted: a gradient scaler
may skip a step, on one rank only perhaps, and nothing that peers wait for may depend on it.

This module must not postpone annotations: DDP refuses hooks whose annotations are strings.
"""

import weakref
from collections.abc import Callable, Iterable
from datetime import timedelta
from functools import partial
from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel

from lightning_accel.algorithms.base import Algorithm, BoundAlgorithm, Context, GradBucket, Parameters
from lightning_accel.background.communicator import Communicator
from lightning_accel.background.statistics import Statistics
from lightning_accel.data_parallel.ddp_process_group import AllReduceInterceptor
from lightning_accel.transport.topology import discover


class Replica:
    """One rank's model in training: a DDP instance, and the algorithm that communicates for it.

    Collective: all ranks of the DDP's process group make it in the same order, close it, and call `consensus`, `pause` and
    `resume` alike. The DDP instance must not have a communication hook. An algorithm that takes whole buckets is one, and DDP
    keeps it for life, so it can be attached once.

    Args:
        ddp: the wrapped model, not yet trained.
        algorithm: options of the algorithm.
        optimizers: for plain PyTorch: whose steps end a round. The strategy calls `before_step` itself and gives none.
        timeout: of a collective; None takes that of the process group.
        node_name: of the machine this process runs on; None asks `lightning_accel.environment`.

    Example:
        >>> ddp = DistributedDataParallel(model)  # doctest: +SKIP
        >>> replica = Replica(ddp, ByteGrad(), optimizers=[optimizer])  # doctest: +SKIP
    """

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
        self.communicator = Communicator(algorithm.name, ddp.process_group, device, timeout, topology)
        self.algorithm: BoundAlgorithm = algorithm.bind(Context(ddp, parameters, self.communicator))
        self.rounds = 0
        """Rounds finished so far."""
        named = zip(parameters.names, parameters.tensors, strict=True)
        self._frozen = {name: p for name, p in named if not p.requires_grad and name not in ddp.parameters_to_ignore}
        self._optimizers: list[torch.optim.Optimizer] = []
        self._in_round = False
        self._has_reduced = False
        self._backward_is_armed = False
        self._buckets = 0
        self._is_closed = False
        self._may_differ = False
        self._end_diversion: Callable[[], Any] | None = None
        if self.algorithm.lets_ddp_divide:
            self._divert_all_reduce(ddp)
        else:
            ddp.register_comm_hook(weakref.ref(self), _reduce_bucket)
        # Outside of what torch.compile may trace: moments are side effects.
        forward_hook = torch.compiler.disable(self._before_forward)  # type: ignore[no-untyped-call]
        self._handles: list[Any] = [ddp.register_forward_pre_hook(forward_hook)]
        # Weak, as the hook on buckets is: optimizers outlive replicas.
        optimizers = list(optimizers)
        step_hook = partial(_before_optimizer_step, weakref.ref(self))
        self._handles += [optimizer.register_step_pre_hook(step_hook) for optimizer in optimizers]
        self._steps_end_rounds = bool(optimizers)
        if optimizers:
            self.attach_optimizers(optimizers)

    def attach_optimizers(self, optimizers: Iterable[torch.optim.Optimizer]) -> None:
        """Lets the algorithm know the optimizers, and when they have stepped. Before the first forward.

        The constructor does it for those that it gets; a strategy, whose optimizers come later, calls this.
        """
        optimizers = list(optimizers)
        hook = partial(_after_optimizer_step, weakref.ref(self))
        self._handles += [optimizer.register_step_post_hook(hook) for optimizer in optimizers]
        self._optimizers = optimizers
        self.algorithm.attach_optimizers(optimizers)

    @property
    def hook_ids(self) -> set[int]:
        """Of the hooks on the DDP instance's forward, which belong to this object alone."""
        return {handle.id for handle in self._handles}

    @property
    def statistics(self) -> Statistics:
        """What communication cost this rank so far."""
        return self.communicator.statistics

    def before_step(self) -> None:
        """Ends the round: gradients are complete, the optimizer has not stepped yet. Nothing outside of a round.

        Raises:
            RuntimeError: if a weight that was frozen at first has a gradient now, which the optimizer would use. In plain PyTorch
                with a closure, whose backward comes after this, one step later.
        """
        self._may_differ = self.algorithm.ranks_differ
        if not self._in_round:
            return
        self._in_round = False
        self._has_reduced = False
        self.rounds += 1
        self._check_frozen()
        self.algorithm.before_step()

    def consensus(self) -> None:
        """Makes all ranks' weights equal. Collective; nothing after a close that has left them equal.

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
        """Stops communication that runs by itself. Collective and idempotent; nothing after `close`."""
        if not self._is_closed:
            self.algorithm.pause()

    def resume(self) -> None:
        """Starts it again. Collective and idempotent; nothing after `close`."""
        if not self._is_closed:
            self.algorithm.resume()

    def state_dict(self) -> dict[str, Any]:
        """Counters and the algorithm's state, as tensors, numbers, strings, lists and dicts."""
        return {"rounds": self.rounds, "algorithm": self.algorithm.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes up what `state_dict` gave, between two rounds."""
        self._in_round = self._has_reduced = False
        self.rounds = int(state["rounds"])
        self.algorithm.load_state_dict(state["algorithm"])

    def close(self) -> None:
        """Ends communication; idempotent, bounded in time, and after a failure too.

        Backward passes after it keep local gradients: DDP keeps its hook. Where the algorithm let DDP divide, it leaves plain
        DDP.
        """
        if self._is_closed:
            return
        self._is_closed = True
        for handle in self._handles:
            handle.remove()
        if self._end_diversion is not None:
            self._end_diversion()
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
        if self._end_diversion is not None and module._comm_hooks:
            raise RuntimeError("the DDP instance got a communication hook, which would take the place of the algorithm")
        self.communicator.check()
        self._backward_is_armed = False  # a backward that failed leaves it set
        self._end_skipped_round()
        if not self._in_round:
            self._in_round = True
            self.algorithm.before_forward()

    def _end_skipped_round(self) -> None:
        """Ends a round whose gradients are complete and in which no optimizer stepped: a gradient scaler skipped it."""
        # The strategy knows better when a round ends: under it, and manual optimisation, this may be one more micro-batch.
        if self._steps_end_rounds and self._in_round and self._has_reduced:
            self.before_step()

    def _check_frozen(self) -> None:
        """DDP and algorithms know the weights that needed a gradient at first: the gradient of another stays each rank's own."""
        unfrozen = [name for name, parameter in self._frozen.items() if parameter.requires_grad and parameter.grad is not None]
        if unfrozen and self._optimizers:  # another model may share the weight, and train it by an optimizer of its own
            stepped = {id(p) for optimizer in self._optimizers for group in optimizer.param_groups for p in group["params"]}
            unfrozen = [name for name in unfrozen if id(self._frozen[name]) in stepped]
        if unfrozen and self.communicator.world_size > 1:
            raise RuntimeError(
                f"{self.communicator.name}: {unfrozen[0]!r} (one of {len(unfrozen)}) was frozen when the model was wrapped, and "
                "has a gradient now, which no other rank gets. Unwrap the model and wrap it anew, or call fit again, once it is "
                "unfrozen"
            )

    def _divert_all_reduce(self, ddp: DistributedDataParallel) -> None:
        if ddp._comm_hooks:
            raise RuntimeError("the DDP instance has a communication hook already; attach the algorithm to one without")
        replica = weakref.ref(self)  # as with the hook: a DDP instance does not keep threads and groups alive

        def all_reduce(divided: torch.Tensor) -> torch.futures.Future[torch.Tensor]:
            attached = replica()
            assert attached is not None
            return attached._all_reduce(divided)

        self._diverted_group = AllReduceInterceptor(ddp.process_group, all_reduce)
        ddp.reducer._update_process_group(self._diverted_group)
        # The reducer holds the group's C++ half only; the Python half must not go before it.
        end_diversion = weakref.finalize(self, ddp.reducer._update_process_group, ddp.process_group)
        end_diversion.atexit = False
        self._end_diversion = end_diversion

    def _reduce(self, bucket: GradBucket) -> torch.futures.Future[torch.Tensor]:
        label = f"bucket {bucket.index()}"
        self._arm()
        try:
            return self.algorithm.reduce_gradients(bucket, label)
        except Exception as error:
            return self.communicator.fail(error, label, bucket.buffer())

    def _all_reduce(self, divided: torch.Tensor) -> torch.futures.Future[torch.Tensor]:
        self._arm()
        label = f"bucket {self._buckets}"
        self._buckets += 1
        try:
            return self.algorithm.all_reduce(divided, label)
        except Exception as error:
            return self.communicator.fail(error, label, divided)

    def _arm(self) -> None:
        """At a backward's first bucket."""
        self._has_reduced = True
        if not self._backward_is_armed:
            self._backward_is_armed = True
            self._buckets = 0
            # Runs at the end of this backward, before DDP's own finalisation: the place to wait with a bound, where Ctrl-C
            # works, and from where an error reaches the training thread as it is.
            torch.autograd.Variable._execution_engine.queue_callback(self._after_backward)

    def _after_backward(self) -> None:
        self._backward_is_armed = False
        self.communicator.wait()


def _before_optimizer_step(replica: Callable[[], Replica | None], *arguments: Any) -> None:
    if (attached := replica()) is not None:
        attached.before_step()


def _after_optimizer_step(replica: Callable[[], Replica | None], optimizer: torch.optim.Optimizer, *arguments: Any) -> None:
    if (attached := replica()) is not None and not attached._is_closed:
        attached.algorithm.after_step(optimizer)


def _reduce_bucket(replica: Callable[[], Replica | None], bucket: GradBucket) -> torch.futures.Future[torch.Tensor]:
    """The hook that DDP calls; a weak reference, so that a DDP instance does not keep threads and groups alive."""
    attached = replica()
    if attached is None or attached._is_closed:
        future: torch.futures.Future[torch.Tensor] = torch.futures.Future()
        future.set_result(bucket.buffer())
        return future
    return attached._reduce(bucket)
