"""From DDP's buckets to messages: the part that all algorithms share that all_reduce gradients by our own routines."""

from __future__ import annotations

from functools import partial

import torch

from lightning_accel.algorithms.base import Context, GradBucket
from lightning_accel.collectives import (
    HierarchicalPlan,
    TwoShotPlan,
    compressed_all_reduce,
    hierarchical_all_reduce,
    pieces_of,
)
from lightning_accel.layout import Layout


class BucketPlans:
    """Plans messages for buckets, once for each set of parameters, and all_reduces along them.

    DDP rebuilds its buckets after the first backward, and their index and address say nothing; the parameters in a bucket do.

    Args:
        context: the replica.
        codec: of the messages between ranks, or between nodes.
        hierarchical: whether ranks of a node sum first, uncompressed. Making it so is collective.
    """

    def __init__(self, context: Context, codec: str, *, hierarchical: bool) -> None:
        communicator = self._communicator = context.communicator
        self._codec = codec
        self._places = {id(tensor): place for place, tensor in enumerate(context.parameters.tensors)}
        if hierarchical:
            communicator.connect_nodes()
        owners, inner = (
            (communicator.node.world_size, communicator.peers.world_size) if hierarchical else (communicator.world_size, 1)
        )
        self._hierarchical = hierarchical
        self._layout = Layout([tensor.numel() for tensor in context.parameters.tensors], owners, inner)
        self._flat_plans: dict[tuple[int, ...], TwoShotPlan] = {}
        self._hierarchical_plans: dict[tuple[int, ...], HierarchicalPlan] = {}

    def all_reduce(self, bucket: GradBucket, label: str, divisor: int) -> torch.futures.Future[torch.Tensor]:
        """Submits the bucket's all_reduce; the future delivers the sum divided by `divisor`, in the bucket's own buffer."""
        communicator, gradients = self._communicator, bucket.buffer()
        parameters = tuple(self._places[id(parameter)] for parameter in bucket.parameters())
        procedure = (
            partial(
                hierarchical_all_reduce,
                gradients,
                self._hierarchical_plan(parameters, gradients.dtype),
                communicator.node,
                communicator.peers,
                communicator.scratch,
                divisor=divisor,
            )
            if self._hierarchical
            else partial(
                compressed_all_reduce,
                gradients,
                self._flat_plan(parameters, gradients.dtype),
                communicator.group,
                communicator.scratch,
                divisor=divisor,
            )
        )
        return communicator.submit(label, gradients, procedure)

    def _flat_plan(self, parameters: tuple[int, ...], dtype: torch.dtype) -> TwoShotPlan:
        plan = self._flat_plans.get(parameters)
        if plan is None:
            group = self._communicator.group
            pieces = pieces_of(self._layout, self._offsets(parameters))
            plan = TwoShotPlan.build(self._codec, dtype, pieces, group.world_size, group.rank)
            self._flat_plans[parameters] = plan
        return plan

    def _hierarchical_plan(self, parameters: tuple[int, ...], dtype: torch.dtype) -> HierarchicalPlan:
        plan = self._hierarchical_plans.get(parameters)
        if plan is None:
            node, peers = self._communicator.node, self._communicator.peers
            plan = HierarchicalPlan.build(self._codec, dtype, self._layout, self._offsets(parameters), node, peers)
            self._hierarchical_plans[parameters] = plan
        return plan

    def _offsets(self, parameters: tuple[int, ...]) -> list[tuple[int, int]]:
        """Pairs of a parameter's place in the layout and its first element in the bucket."""
        places = []
        offset = 0
        for parameter in parameters:
            places.append((parameter, offset))
            offset += self._layout.numels[parameter]
        return places
