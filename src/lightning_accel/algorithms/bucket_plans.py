"""From DDP's buckets to messages: the part that all algorithms share that all_reduce gradients by our own routines."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from lightning_accel.algorithms.base import Context, GradBucket
from lightning_accel.collectives import (
    HierarchicalPlan,
    TwoShotPlan,
    compressed_all_gather,
    compressed_reduce_scatter,
    hierarchical_all_gather,
    hierarchical_reduce_scatter,
    pieces_of,
)
from lightning_accel.layout import Layout


@dataclass(frozen=True)
class _Halves:
    """A bucket's all_reduce in two halves, each to be run in its own lane.

    Attributes:
        reduce_scatter: takes gradients and divisor, leaves this rank's means in a message of the bucket's own, so that the
            next bucket may start while this one is gathered.
        all_gather: takes gradients, overwrites them.
    """

    reduce_scatter: Callable[[torch.Tensor, int], None]
    all_gather: Callable[[torch.Tensor], None]


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
        self._scattering = context.communicator.open_lane(with_nodes=hierarchical)
        self._gathering = context.communicator.open_lane(with_nodes=hierarchical)
        lane = self._scattering
        owners, inner = (lane.node.world_size, lane.peers.world_size) if hierarchical else (lane.group.world_size, 1)
        self._layout = Layout([tensor.numel() for tensor in context.parameters.tensors], owners, inner)
        self._halves: dict[tuple[int, ...], _Halves] = {}

    def all_reduce(self, bucket: GradBucket, label: str, divisor: int) -> torch.futures.Future[torch.Tensor]:
        """Submits the bucket's all_reduce; the future delivers the sum divided by `divisor`, in the bucket's own buffer."""
        gradients = bucket.buffer()
        parameters = tuple(self._places[id(parameter)] for parameter in bucket.parameters())
        halves = self._halves.get(parameters)
        if halves is None:
            plan = self._plan_hierarchical if self._hierarchical else self._plan_flat
            halves = self._halves[parameters] = plan(self._find(parameters), gradients)
        return self._communicator.submit(
            label,
            gradients,
            (self._scattering, partial(halves.reduce_scatter, gradients, divisor)),
            (self._gathering, partial(halves.all_gather, gradients)),
        )

    def _plan_flat(self, places: list[tuple[int, int]], gradients: torch.Tensor) -> _Halves:
        first, second = self._scattering, self._gathering
        pieces = pieces_of(self._layout, places)
        plan = TwoShotPlan.build(self._codec, gradients.dtype, pieces, first.group.world_size, first.group.rank)
        mean = torch.empty(plan.stride_bytes, dtype=torch.uint8, device=gradients.device)
        return _Halves(
            lambda tensor, divisor: compressed_reduce_scatter(tensor, plan, mean, first.group, first.scratch, divisor=divisor),
            lambda tensor: compressed_all_gather(mean, plan, tensor, second.group, second.scratch),
        )

    def _plan_hierarchical(self, places: list[tuple[int, int]], gradients: torch.Tensor) -> _Halves:
        first, second = self._scattering, self._gathering
        plan = HierarchicalPlan.build(self._codec, gradients.dtype, self._layout, places, first.node, first.peers)
        mean = torch.empty(plan.between.stride_bytes, dtype=torch.uint8, device=gradients.device)
        return _Halves(
            lambda tensor, divisor: hierarchical_reduce_scatter(
                tensor, plan, mean, first.node, first.peers, first.scratch, divisor=divisor
            ),
            lambda tensor: hierarchical_all_gather(mean, plan, tensor, second.node, second.peers, second.scratch),
        )

    def _find(self, parameters: tuple[int, ...]) -> list[tuple[int, int]]:
        """Pairs of a parameter's place in the layout and its first element in the bucket."""
        places = []
        offset = 0
        for parameter in parameters:
            places.append((parameter, offset))
            offset += self._layout.numels[parameter]
        return places
