"""From DDP's buckets to messages: the part that all algorithms share that all_reduce gradients by our own routines."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from lightning_accel import environment
from lightning_accel.algorithms.base import Context, GradBucket
from lightning_accel.background.comm_queue import QueueGroups
from lightning_accel.collectives.hierarchical import HierarchicalPlan, hierarchical_all_reduce_steps
from lightning_accel.collectives.message_plan import TwoShotPlan, pieces_of
from lightning_accel.collectives.shared_memory import PeerMemory, open_peer_memory
from lightning_accel.collectives.two_shot import compressed_all_reduce_steps
from lightning_accel.compression.block_layout import Layout
from lightning_accel.compression.error_feedback import ErrorFeedback
from lightning_accel.native import DTYPES
from lightning_accel.transport.scratch import Scratch

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
        error_feedback: whether what codes lose is kept and sent later.

    Making it is collective.
    """

    def __init__(self, context: Context, codec: str, *, hierarchical: bool, error_feedback: bool = False) -> None:
        self._communicator = context.communicator
        self._codec = codec
        self._hierarchical = hierarchical
        self._parameters = context.parameters.tensors
        self._places = {id(tensor): place for place, tensor in enumerate(context.parameters.tensors)}
        for name, tensor in zip(context.parameters.names, context.parameters.tensors, strict=True):
            if tensor.requires_grad and tensor.dtype not in DTYPES:
                raise ValueError(
                    f"gradients must be {', '.join(str(dtype) for dtype in DTYPES)}: parameter {name!r} is {tensor.dtype}"
                )
        topology, world_size = context.communicator.topology, context.communicator.world_size
        if hierarchical:
            of_queues: list[QueueGroups] = ["nodes", "nodes"]
        else:
            # A step starts the message that the next one waits for. Two ranks have enough of one message.
            of_queues = ["all", "none"] if world_size <= 2 else ["all", "all", "none"]
        self._queues = [context.communicator.open_queue(groups) for groups in of_queues]
        owners = len(topology.nodes[0]) if hierarchical else world_size
        self._layout = Layout([tensor.numel() for tensor in context.parameters.tensors], owners)
        # What is coded, and among which ranks: everything, or between nodes this rank's share.
        self._coded, coders = self._layout, self._queues[0].inter_node if hierarchical else self._queues[0].group
        if hierarchical:
            self._coded = self._layout.share(self._queues[0].intra_node.rank, coders.world_size)
        self._coders = coders
        self._device = context.parameters.tensors[0].device
        self._peers: PeerMemory | None = None
        if environment.wants_peer_memory() and not hierarchical and world_size > 1:
            self._peers = self._open_peer_memory()
            self._queues = self._queues[:1] if self._peers is not None else self._queues
        self._feedback: ErrorFeedback | None = None
        if error_feedback:
            self.keep_residuals()
        self._buckets: dict[tuple[torch.dtype, tuple[int, ...]], _Bucket] = {}

    def all_reduce(
        self, bucket: GradBucket, label: str, divisor: int, before: Callable[[], None] | None = None
    ) -> torch.futures.Future[torch.Tensor]:
        """Submits the bucket's all_reduce; the future delivers the sum divided by `divisor`, in the bucket's own buffer.

        `before` changes the bucket first, where the all_reduce runs.
        """
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
        if before is not None:
            steps[0] = _one_after_the_other(before, steps[0])
        return self._communicator.submit(label, gradients, *zip(self._queues, steps, strict=True), first_waits=self._hierarchical)

    def keep_residuals(self) -> None:
        """Turns error feedback on, where anything is quantised."""
        coded, coders = self._coded, self._coders
        if coders.world_size > 1 and self._feedback is None:
            server_numel = coded.numel if coders.world_size <= 2 else coded.owned_numels[coders.rank]
            self._feedback = ErrorFeedback(coded.numel, server_numel, self._device)

    def commit(self, optimizer: torch.optim.Optimizer) -> None:
        """Takes up the residuals of the last backward, of the parameters whose gradients this optimizer has used.

        Those of others, which step by another optimizer or were not used in this round, keep what their last step left: the
        code of this backward reaches nobody.
        """
        if self._feedback is None:
            return
        stepped = {id(p) for group in optimizer.param_groups for p in group["params"] if p.grad is not None}
        if stepped >= {id(p) for p in self._parameters if p.requires_grad}:
            self._feedback.commit()
        else:
            places = sorted(self._places[one] for one in stepped & self._places.keys())
            self._feedback.commit([ranges for place in places for ranges in self._residual_ranges(place)])

    def _open_peer_memory(self) -> PeerMemory | None:
        group, communicator = self._queues[0].group, self._communicator
        dtypes = {tensor.dtype for tensor in self._parameters if tensor.requires_grad}
        plans = []
        for dtype in sorted(dtypes, key=str):  # as large as a bucket can get: DDP's first one may hold all of a dtype
            places = [(place, 0) for place, p in enumerate(self._parameters) if p.requires_grad and p.dtype == dtype]
            plans.append(TwoShotPlan.build(self._codec, dtype, pieces_of(self._layout, places), group.world_size, group.rank))
        is_one_node = len(communicator.topology.nodes) == 1
        peers = open_peer_memory(group, plans, self._device, communicator.timeout, is_one_node=is_one_node)
        if peers is not None:
            communicator.watch(peers)
        return peers

    def _residual_ranges(self, parameter: int) -> Iterator[tuple[str, int, int]]:
        """Where a parameter's residuals are: the kind, the first one, how many."""
        coders = self._coders
        for span in self._coded.spans(parameter):
            yield "worker", span.place, span.numel
            if coders.world_size <= 2:
                yield "server", span.place, span.numel
            elif span.owner == coders.rank:
                yield "server", span.owned_place, span.numel

    def rank_state_dict(self) -> dict[str, Any]:
        """This rank's residuals, if there are any."""
        return self._feedback.state_dict() if self._feedback is not None else {}

    def load_rank_state_dict(self, state: dict[str, Any]) -> None:
        """Takes up what `rank_state_dict` gave on this rank.

        Raises:
            ValueError: if it is of another model, number of ranks or hierarchy.
        """
        if self._feedback is not None and state:
            self._feedback.load_state_dict(state)

    def _plan(self, places: list[tuple[int, int]], dtype: torch.dtype) -> TwoShotPlan | HierarchicalPlan:
        first = self._queues[0]
        if self._hierarchical:
            return HierarchicalPlan.build(
                self._codec, dtype, self._layout, self._coded, places, first.intra_node, first.inter_node
            )
        group = first.group
        return TwoShotPlan.build(self._codec, dtype, pieces_of(self._layout, places), group.world_size, group.rank)

    def _steps(self, gradients: torch.Tensor, bucket: _Bucket, divisor: int) -> Steps:
        plan = bucket.plan
        feedback = self._feedback.take() if self._feedback is not None else None
        if self._peers is not None:
            assert isinstance(plan, TwoShotPlan)
            return [partial(self._peers.all_reduce, gradients, plan, divisor=divisor, feedback=feedback)]
        first, second = self._queues[:2]
        if isinstance(plan, TwoShotPlan):
            groups = first.group, first.group if plan.is_whole else second.group
            return compressed_all_reduce_steps(gradients, plan, *groups, bucket.kept, divisor=divisor, feedback=feedback)
        groups_and_scratch = first.intra_node, first.inter_node, second.intra_node, bucket.kept, first.scratch, second.scratch
        return hierarchical_all_reduce_steps(gradients, plan, *groups_and_scratch, divisor=divisor, feedback=feedback)

    def _forget(self) -> None:
        """Drops plans and memory of buckets that DDP has rebuilt.

        Its first backward has one bucket with everything. Called at a backward's first bucket, when nothing is pending.
        """
        streams = [queue.stream for queue in self._queues if queue.stream is not None]
        for scratch in [*(bucket.kept for bucket in self._buckets.values()), *(queue.scratch for queue in self._queues)]:
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


def _one_after_the_other(first: Callable[[], None], second: Callable[[], None]) -> Callable[[], None]:
    def run() -> None:
        first()
        second()

    return run
