"""Takes gradients from DDP's backward, bucket by bucket, to an algorithm.

This module must not postpone annotations: DDP refuses hooks whose annotations are strings.
"""

import weakref
from collections.abc import Callable
from functools import partial

import torch
from torch.nn.parallel import DistributedDataParallel

from lightning_accel.algorithms.base import BoundAlgorithm, GradBucket
from lightning_accel.data_parallel.ddp_collectives import DDPCollectives


class DDPHook:
    """Hands the buckets of a DDP instance to an algorithm, and waits for them at the end of each backward.

    If the algorithm `lets_ddp_divide`, they come with DDP's own all_reduces (`DDPCollectives`); else DDP gets a communication
    hook, which it keeps for life. DDP holds this object weakly, so that it keeps no threads and groups alive. Making it is
    collective.

    Args:
        ddp: DDP instance without a communication hook.
        algorithm: Receiver of the buckets.
        on_backward: Function to call when a backward hands over its first bucket.
    """

    def __init__(self, ddp: DistributedDataParallel, algorithm: BoundAlgorithm, on_backward: Callable[[], None]) -> None:
        self._algorithm = algorithm
        self._on_backward = on_backward
        self._buckets = 0
        """Number of buckets that the current backward has handed over; 0 outside a backward."""
        self._is_attached = True
        if ddp._comm_hooks:
            raise RuntimeError("the DDP instance has a communication hook already; attach the algorithm to one without")
        reference = weakref.ref(self)

        def all_reduce(divided: torch.Tensor) -> torch.futures.Future[torch.Tensor]:
            hook = reference()
            assert hook is not None
            return hook._start(f"bucket {hook._buckets}", divided, partial(hook._algorithm.all_reduce, divided))

        self._collectives = DDPCollectives(ddp, algorithm.communicator, all_reduce)
        if not algorithm.lets_ddp_divide:
            ddp.register_comm_hook(reference, _reduce_bucket)

    def before_forward(self, ddp: DistributedDataParallel) -> None:
        """Refuses a hook in the algorithm's place, and forgets the buckets of a backward that failed."""
        if self._algorithm.lets_ddp_divide and ddp._comm_hooks:
            raise RuntimeError("the DDP instance got a communication hook, which would take the place of the algorithm")
        self._buckets = 0

    def detach(self) -> None:
        """Leaves gradients to DDP if the algorithm let it divide; else they stay local, as DDP keeps its hook."""
        self._is_attached = False
        self._collectives.end()

    def _start(
        self, label: str, tensor: torch.Tensor, start: Callable[[str], torch.futures.Future[torch.Tensor]]
    ) -> torch.futures.Future[torch.Tensor]:
        """Starts to reduce a bucket; if that fails the future delivers `tensor` as it is, and the wait raises the error."""
        is_in_backward = torch._C._current_graph_task_id() >= 0
        self._buckets += 1
        if self._buckets == 1:
            self._on_backward()
            if is_in_backward:
                # Runs at the end of this backward, before DDP's own finalisation: the place to wait with a bound, where Ctrl-C
                # works, and from where an error reaches the training thread as it is.
                _call_at_end_of_backward(self._after_buckets)
        try:
            future = start(label)
        except Exception as error:
            future = self._algorithm.communicator.fail(error, label, tensor)
        if not is_in_backward:
            # With a static graph under manual optimisation, Lightning makes DDP hand over the first backward's buckets after it.
            self._wait()
        return future

    def _after_buckets(self) -> None:
        self._wait()
        _call_at_end_of_backward(self._algorithm.after_backward)  # one that is queued now runs after DDP's finalisation

    def _wait(self) -> None:
        self._buckets = 0
        self._algorithm.communicator.wait()


def _call_at_end_of_backward(function: Callable[[], None]) -> None:
    torch.autograd.Variable._execution_engine.queue_callback(function)


def _reduce_bucket(reference: Callable[[], DDPHook | None], bucket: GradBucket) -> torch.futures.Future[torch.Tensor]:
    """Reduces a bucket for DDP, which asks that the second parameter is named `bucket`."""
    hook = reference()
    if hook is None or not hook._is_attached:
        future: torch.futures.Future[torch.Tensor] = torch.futures.Future()
        future.set_result(bucket.buffer())
        return future
    return hook._start(f"bucket {bucket.index()}", bucket.buffer(), partial(hook._algorithm.reduce_gradients, bucket))
