"""From DDP's buckets to messages: the part that all algorithms share that all_reduce gradients by our own routines."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from lightning_accel.algorithms.base import Context, GradBucket
from lightning_accel.codecs import DTYPES
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
        for name, tensor in zip(context.parameters.names, context.parameters.tensors, strict=True):
            if tensor.requires_grad and tensor.dtype not in DTYPES:
                raise ValueError(
                    f"gradients must be {', '.join(str(dtype) for dtype in DTYPES)}: parameter {name!r} is {tensor.dtype}"
                )
        self._scattering = context.communicator.open_lane(with_nodes=hierarchical)
        self._gathering = context.communicator.open_lane(with_nodes=hierarchical)
        lane = self._scattering
        owners, inner = (lane.node.world_size, lane.peers.world_size) if hierarchical else (lane.group.world_size, 1)
        self._layout = Layout([tensor.numel() for tensor in context.parameters.tensors], owners, inner)
        self._halves: dict[tuple[torch.dtype, tuple[int, ...]], _Halves] = {}

    def all_reduce(self, bucket: GradBucket, label: str, divisor: int) -> torch.futures.Future[torch.Tensor]:
        """Submits the bucket's all_reduce; the future delivers the sum divided by `divisor`, in the bucket's own buffer."""
        gradients = bucket.buffer()
        if gradients.layout != torch.strided:
            raise TypeError(f"only dense gradients can be coded, got {gradients.layout}: use sparse=False in embeddings")
        parameters = tuple(self._places[id(parameter)] for parameter in bucket.parameters())
        halves = self._halves.get((gradients.dtype, parameters))
        if halves is None:
            if bucket.index() == 0:
                self._forget()
            plan = self._plan_hierarchical if self._hierarchical else self._plan_flat
            halves = plan(self._find(parameters), gradients)
            self._halves[gradients.dtype, parameters] = halves
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
        mean = self._message(plan.stride_bytes, gradients.device)
        return _Halves(
            lambda tensor, divisor: compressed_reduce_scatter(tensor, plan, mean, first.group, first.scratch, divisor=divisor),
            lambda tensor: compressed_all_gather(mean, plan, tensor, second.group, second.scratch),
        )

    def _plan_hierarchical(self, places: list[tuple[int, int]], gradients: torch.Tensor) -> _Halves:
        first, second = self._scattering, self._gathering
        plan = HierarchicalPlan.build(self._codec, gradients.dtype, self._layout, places, first.node, first.peers)
        mean = self._message(plan.between.stride_bytes, gradients.device)
        return _Halves(
            lambda tensor, divisor: hierarchical_reduce_scatter(
                tensor, plan, mean, first.node, first.peers, first.scratch, divisor=divisor
            ),
            lambda tensor: hierarchical_all_gather(mean, plan, tensor, second.node, second.peers, second.scratch),
        )

    def _message(self, wire_bytes: int, device: torch.device) -> torch.Tensor:
        """Memory that both lanes use, for as long as the plan lives."""
        message = torch.empty(wire_bytes, dtype=torch.uint8, device=device)
        for stream in (self._scattering.stream, self._gathering.stream):
            if stream is not None:
                message.record_stream(stream)
        return message

    def _forget(self) -> None:
        """Drops plans and memory of buckets that DDP has rebuilt.

        Its first backward has one bucket with everything. Called at a backward's first bucket, when nothing is pending.
        """
        self._halves.clear()
        self._scattering.scratch.clear()
        self._gathering.scratch.clear()

    def _find(self, parameters: tuple[int, ...]) -> list[tuple[int, int]]:
        """Pairs of a parameter's place in the layout and its first element in the bucket."""
        places = []
        offset = 0
        for parameter in parameters:
            places.append((parameter, offset))
            offset += self._layout.numels[parameter]
        return places
