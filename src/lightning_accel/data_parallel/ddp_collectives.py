"""What DDP itself sends in a step, sent by groups of ours: gradients that it divides, buffers, and what it tells other ranks.

On DDP's own group, a rank that is gone gives an error without names, one that is stuck is waited for as long as that group's
timeout says, and Ctrl-C is not heard meanwhile.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import _create_work_from_future  # type: ignore[attr-defined]
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parallel.distributed import _BufferCommHookLocation

from lightning_accel.background.comm_queue import CommQueue, Step
from lightning_accel.background.communicator import Communicator
from lightning_accel.collectives.checked_broadcast import CheckedBroadcast

Future = torch.futures.Future[torch.Tensor]


class DDPCollectives:
    """Stands between a DDP instance and its process group. Making it is collective.

    DDP holds it weakly, so that it keeps no threads and groups alive.

    Args:
        ddp: DDP instance.
        communicator: Communicator that sends everything.
        all_reduce: Function that starts to sum a bucket that DDP has divided; its future delivers the bucket, and never fails.
    """

    def __init__(
        self, ddp: DistributedDataParallel, communicator: Communicator, all_reduce: Callable[[torch.Tensor], Future]
    ) -> None:
        self._communicator = communicator
        self._queue = communicator.open_queue("all")
        self._messages: dict[torch.device, CheckedBroadcast] = {}
        # The reducer holds the group's C++ half only; the Python half must not go before it.
        self._group = _reducer_group()(ddp.process_group, communicator, self._queue, all_reduce)
        ddp.reducer._update_process_group(self._group)
        # Kept out of what torch.compile traces. Not by a decorator, which would import torch's compiler with this module.
        buffer_hook = torch.compiler.disable(_broadcast_buffers)  # type: ignore[no-untyped-call]
        self._give_back = weakref.finalize(self, _give_back, weakref.ref(ddp), buffer_hook)
        self._give_back.atexit = False
        if communicator.world_size > 1 and not hasattr(ddp, "buffer_hook"):
            ddp._register_buffer_comm_hook(weakref.ref(self), buffer_hook, _BufferCommHookLocation.PRE_FORWARD)

    def end(self) -> None:
        """Leaves it all to DDP again."""
        self._give_back()

    @torch.inference_mode(False)  # the first forward of an evaluation broadcasts too
    @torch.no_grad()
    def broadcast_buffers(self, buffers: list[torch.Tensor]) -> None:
        """Overwrites buffers, such as BatchNorm's statistics, with rank 0's. Collective."""
        for device in dict.fromkeys(buffer.device for buffer in buffers):
            tensors = [buffer for buffer in buffers if buffer.device == device]
            message = self._messages.get(device)
            if message is None or not message.fits(tensors):
                message = self._messages[device] = CheckedBroadcast(tensors)
            if self._communicator.rank == 0:
                message.gather(tensors)
            step = Step("broadcast", self._queue, partial(message.send, self._queue.group))
            future = self._communicator.submit("buffers", message.message, step, is_gradient=False)
            self._communicator.wait()
            future.wait()  # lets a GPU's stream wait
            if self._communicator.rank != 0:
                message.scatter(tensors)


class _ReducerGroup(dist.ProcessGroup):
    """A process group as DDP's reducer uses it.

    With a communication hook DDP leaves the division by the number of ranks to the hook, one more pass over memory; without
    one it divides while it copies gradients into buckets. Here a bucket arrives divided.
    """

    def __init__(
        self,
        process_group: dist.ProcessGroup,
        communicator: Communicator,
        queue: CommQueue,
        all_reduce: Callable[[torch.Tensor], Future],
    ) -> None:
        super().__init__(process_group.rank(), process_group.size())  # type: ignore[call-arg]
        self._communicator = communicator
        self._queue = queue
        self._all_reduce = all_reduce

    # torch's ProcessGroup calls these by their names and with these arguments.

    def allreduce(self, tensors: list[torch.Tensor], options: Any) -> dist.Work:  # type: ignore[override]
        """Sums a bucket, or the integers by which DDP learns which parameters were used; it waits for them after our own wait."""
        (tensor,) = tensors
        if tensor.is_floating_point() or tensor.is_complex():
            return _work_of(self._all_reduce(tensor))
        return _work_of(self._communicator.all_reduce("used parameters", tensor, self._queue, is_gradient=False))

    def broadcast(self, tensors: list[torch.Tensor], options: Any) -> dist.Work:  # type: ignore[override]
        """Tells all ranks rank 0's order of buckets."""
        (tensor,) = tensors
        if self._communicator.world_size == 1:
            alone: Future = torch.futures.Future()
            alone.set_result(tensor)
            return _work_of(alone)
        step = Step("broadcast", self._queue, partial(self._queue.group.broadcast, tensor.view(torch.uint8)))
        future = self._communicator.submit("order of buckets", tensor, step, is_gradient=False)
        self._communicator.wait()  # DDP's own wait would have no bound
        return _work_of(future)


@cache
def _reducer_group() -> type[_ReducerGroup]:
    """Returns the class with its methods kept out of what torch.compile traces."""
    names = ("allreduce", "broadcast")
    methods = {name: torch.compiler.disable(getattr(_ReducerGroup, name)) for name in names}  # type: ignore[no-untyped-call]
    return type("ReducerGroup", (_ReducerGroup,), methods)


def _broadcast_buffers(reference: Callable[[], DDPCollectives | None], buffers: dict[str, torch.Tensor]) -> None:
    if (collectives := reference()) is not None:
        collectives.broadcast_buffers(list(buffers.values()))


def _give_back(reference: Callable[[], DistributedDataParallel | None], buffer_hook: Callable[..., None]) -> None:
    if (ddp := reference()) is not None:
        ddp.reducer._update_process_group(ddp.process_group)
        if hasattr(ddp, "buffer_hook") and ddp.buffer_hook.buffer_comm_hook is buffer_hook:
            del ddp.buffer_hook


def _work_of(future: Future) -> dist.Work:
    work: dist.Work = _create_work_from_future(future)
    return work
