"""Averages gradients at full precision, as DDP does; the baseline of all other algorithms."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lightning_accel.algorithms.base import Algorithm, BoundAlgorithm, Context, GradBucket
from lightning_accel.algorithms.common.bucket_reducer import BucketReducer
from lightning_accel.algorithms.common.option_checks import check_average, check_hierarchical
from lightning_accel.algorithms.registry import register_algorithm
from lightning_accel.transport.topology import Hierarchical, Topology


@register_algorithm("gradient_allreduce")
@dataclass(frozen=True)
class GradientAllReduce(Algorithm):
    """Gives every rank the mean of all ranks' gradients, uncompressed.

    g <- 1/n sum_r g_r

    The flat form is the backend's all_reduce of DDP's buckets, which DDP divides as it fills them; it equals DDP bit for bit.
    From three ranks on, a backend's order of summation depends on an element's place in its bucket. So, as with DDP, the last
    bits depend on `bucket_cap_mb`, and differ after a resume, whose first backward has other buckets. `hierarchical=True`, and
    `bytegrad` with codec "none", give the same bits whatever the buckets are.

    In the hierarchical form ranks of a node sum first, and each carries its share between nodes; sums run in rank order, in
    float32. It is off by default: the backends' own all_reduce knows nodes too (NCCL), or is bandwidth-optimal anyway (gloo's
    ring).

    Cost of a step for each rank: 2 (n-1)/n times the gradients' bytes; as many all_reduces as buckets; no memory.

    Args:
        hierarchical: Whether ranks of a node combine what they have first, uncompressed, so that less travels between nodes:
            True, False, or "auto": when there are several nodes with equally many ranks, more than one, on each.
        average: Whether ranks get the mean; False leaves the sum.

    Example:
        >>> GradientAllReduce(average=False)
        GradientAllReduce(hierarchical=False, average=False)
    """

    hierarchical: Hierarchical = False
    average: bool = True

    def __post_init__(self) -> None:
        check_hierarchical(self.hierarchical)
        check_average(self.average)

    def bind(self, context: Context) -> BoundAlgorithm:
        """Makes the flat or the hierarchical form, as the nodes allow. Collective."""
        if context.communicator.topology.use_hierarchy(self.hierarchical):
            return _Hierarchical(context, self)
        return _Flat(context, self)

    def needs_kernels(self, topology: Topology) -> bool:
        """Whether ranks of a node sum first, by kernels."""
        return topology.use_hierarchy(self.hierarchical)


class _Flat(BoundAlgorithm):
    def __init__(self, context: Context, options: GradientAllReduce) -> None:
        super().__init__(context)
        self.lets_ddp_divide = options.average
        self._queue = context.communicator.open_queue("all")

    def all_reduce(self, divided: torch.Tensor, label: str) -> torch.futures.Future[torch.Tensor]:
        return self.communicator.all_reduce(label, divided, self._queue)

    def reduce_gradients(self, bucket: GradBucket, label: str) -> torch.futures.Future[torch.Tensor]:
        return self.communicator.all_reduce(label, bucket.buffer(), self._queue)


class _Hierarchical(BoundAlgorithm):
    def __init__(self, context: Context, options: GradientAllReduce) -> None:
        super().__init__(context)
        self._reducer = BucketReducer(context, "none", hierarchical=True)
        self._divisor = context.communicator.world_size if options.average else 1

    def reduce_gradients(self, bucket: GradBucket, label: str) -> torch.futures.Future[torch.Tensor]:
        return self._reducer.all_reduce(bucket, label, self._divisor)
