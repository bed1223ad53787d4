"""From DDP's buckets to messages: the part that all algorithms share that all_reduce gradients by our own routines."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from lightning_accel.algorithms.base import Context, GradBucket
from lightning_accel.codecs import DTYPES
from lightning_accel.collectives import (
    HierarchicalPlan,
    Scratch,
    TwoShotPlan,
    compressed_all_reduce_steps,
    hierarchical_all_reduce_steps,
    pieces_of,
)
from lightning_accel.communicator import LaneGroups
from lightning_accel.layout import Layout

Steps = list[Callable[[], None]]


@dataclass(frozen=True)
class _Bucket:
    """What is known of a bucket with certain parameters.

    Attributes:
        plan: its messages.
        kept: memory for what is under way; buckets overtake one another, so each has its own.
    """

    plan: TwoShotPlan | HierarchicalPlan
    kept: Scratch


class BucketPlans:
    """Plans messages for buckets, once for each set of parameters, and all_reduces along them.

    DDP rebuilds its buckets after the first backward, and their index and address say nothing; the parameters in a bucket do.

    Args:
        context: the replica.
        codec: of the messages between ranks, or between nodes.
        hierarchical: whether ranks of a node sum first, uncompressed.

    Making it is collective.
    """

    def __init__(self, context: Context, codec: str, *, hierarchical: bool) -> None:
        self._communicator = context.communicator
        self._codec = codec
        self._hierarchical = hierarchical
        self._places = {id(tensor): place for place, tensor in enumerate(context.parameters.tensors)}
        for name, tensor in zip(context.parameters.names, context.parameters.tensors, strict=True):
            if tensor.requires_grad and tensor.dtype not in DTYPES:
                raise ValueError(
                    f"gradients must be {', '.join(str(dtype) for dtype in DTYPES)}: parameter {name!r} is {tensor.dtype}"
                )
        topology, world_size = context.communicator.topology, context.communicator.world_size
        if hierarchical:
            owners, inner = len(topology.nodes[0]), len(topology.nodes)
            of_lanes: list[LaneGroups] = ["nodes", "nodes"]
        else:
            owners, inner = world_size, 1
            # A step starts the message that the next one waits for. Two ranks have enough of one message.
            of_lanes = ["all", "none"] if world_size <= 2 else ["all", "all", "none"]
        self._lanes = [context.communicator.open_lane(groups) for groups in of_lanes]
        self._layout = Layout([tensor.numel() for tensor in context.parameters.tensors], owners, inner)
        self._buckets: dict[tuple[torch.dtype, tuple[int, ...]], _Bucket] = {}

    def all_reduce(self, bucket: GradBucket, label: str, divisor: int) -> torch.futures.Future[torch.Tensor]:
        """Submits the bucket's all_reduce; the future delivers the sum divided by `divisor`, in the bucket's own buffer."""
        gradients = bucket.buffer()
        if gradients.layout != torch.strided:
            raise TypeError(f"only dense gradients can be coded, got {gradients.layout}: use sparse=False in embeddings")
        parameters = tuple(self._places[id(parameter)] for parameter in bucket.parameters())
        known = self._buckets.get((gradients.dtype, parameters))
        if known is None:
            if bucket.index() == 0:
                self._forget()
            known = _Bucket(self._plan(self._find(parameters), gradients.dtype), Scratch())
            self._buckets[gradients.dtype, parameters] = known
        steps = self._steps(gradients, known, divisor)
        return self._communicator.submit(label, gradients, *zip(self._lanes, steps, strict=True), first_waits=self._hierarchical)

    def _plan(self, places: list[tuple[int, int]], dtype: torch.dtype) -> TwoShotPlan | HierarchicalPlan:
        first = self._lanes[0]
        if self._hierarchical:
            return HierarchicalPlan.build(self._codec, dtype, self._layout, places, first.node, first.peers)
        group = first.group
        return TwoShotPlan.build(self._codec, dtype, pieces_of(self._layout, places), group.world_size, group.rank)

    def _steps(self, gradients: torch.Tensor, bucket: _Bucket, divisor: int) -> Steps:
        plan, first, second = bucket.plan, *self._lanes[:2]
        if isinstance(plan, TwoShotPlan):
            groups = first.group, first.group if plan.is_whole else second.group
            return compressed_all_reduce_steps(gradients, plan, *groups, bucket.kept, divisor=divisor)
        scratches = bucket.kept, first.scratch, second.scratch
        return hierarchical_all_reduce_steps(gradients, plan, first.node, first.peers, second.node, *scratches, divisor=divisor)

    def _forget(self) -> None:
        """Drops plans and memory of buckets that DDP has rebuilt.

        Its first backward has one bucket with everything. Called at a backward's first bucket, when nothing is pending.
        """
        streams = [lane.stream for lane in self._lanes if lane.stream is not None]
        for scratch in [*(bucket.kept for bucket in self._buckets.values()), *(lane.scratch for lane in self._lanes)]:
            scratch.clear(streams)
        self._buckets.clear()

    def _find(self, parameters: tuple[int, ...]) -> list[tuple[int, int]]:
        """Pairs of a parameter's place in the layout and its first element in the bucket."""
        places = []
        offset = 0
        for parameter in parameters:
            places.append((parameter, offset))
            offset += self._layout.numels[parameter]
        return places
