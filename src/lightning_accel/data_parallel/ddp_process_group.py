"""Stands between DDP and its process group, so that DDP's own all_reduces can be issued elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import _create_work_from_future  # type: ignore[attr-defined]


class AllReduceInterceptor(dist.ProcessGroup):
    """A process group as DDP's reducer uses it, which hands the all_reduces of gradients to a function.

    With a communication hook DDP leaves the division by the number of ranks to the hook, one more pass over memory; without
    one it divides while it copies gradients into buckets. Here a bucket arrives divided.

    Args:
        process_group: The reducer's own group, which carries everything but gradients.
        all_reduce: Function that starts the sum of a divided bucket; its future delivers the bucket, and never fails.
    """

    def __init__(
        self, process_group: dist.ProcessGroup, all_reduce: Callable[[torch.Tensor], torch.futures.Future[torch.Tensor]]
    ) -> None:
        super().__init__(process_group.rank(), process_group.size())  # type: ignore[call-arg]
        self._process_group = process_group
        self._all_reduce = all_reduce

    # torch's ProcessGroup calls these by their names and with these arguments.

    def allreduce(self, tensors: list[torch.Tensor], options: Any) -> dist.Work:  # type: ignore[override]
        """Intercepts gradients; passes on the integers by which DDP sums which parameters were used."""
        (tensor,) = tensors
        if not (tensor.is_floating_point() or tensor.is_complex()):
            return self._process_group.allreduce(tensors, options)
        work: dist.Work = _create_work_from_future(self._all_reduce(tensor))
        return work

    def broadcast(self, tensors: list[torch.Tensor], options: Any) -> dist.Work:  # type: ignore[override]
        """Passes on buffers, and the order of buckets."""
        return self._process_group.broadcast(tensors, options)
