"""The all_reduce by nodes: uncompressed inside a node, compressed between nodes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from lightning_accel.collectives.message_plan import TwoShotPlan, pieces_of
from lightning_accel.collectives.two_shot import compressed_all_reduce_steps
from lightning_accel.compression import operations
from lightning_accel.compression.block_layout import Layout
from lightning_accel.compression.error_feedback import Feedback
from lightning_accel.compression.plan import Plan
from lightning_accel.transport.group import Group
from lightning_accel.transport.scratch import Scratch


@dataclass(frozen=True)
class HierarchicalPlan:
    """Messages of one tensor in a hierarchical all_reduce, for one rank.

    Attributes:
        inside: the tensor among the ranks of a node, uncompressed.
        share: this rank's message of `inside` as a dense tensor.
        share_numel: elements of that.
        between: the dense tensor among the ranks of equal local rank.
    """

    inside: TwoShotPlan
    share: Plan
    share_numel: int
    between: TwoShotPlan

    @classmethod
    def build(
        cls,
        codec: str,
        dtype: torch.dtype,
        layout: Layout,
        share: Layout,
        places: Sequence[tuple[int, int]],
        intra_node: Group,
        inter_node: Group,
    ) -> HierarchicalPlan:
        """Plans a tensor that holds parameters: pairs of a place in the layout and the first element in the tensor.

        `share` is this rank's share of the layout.
        """
        starts = []
        share_places = []
        share_numel = 0
        for parameter, _ in places:
            starts.append(share_numel)
            share_places.append((parameter, share_numel))
            share_numel += share.numels[parameter]
        value_dtype = torch.float64 if dtype == torch.float64 else torch.float32
        # Nothing is quantised where nothing leaves the node.
        between_codec = codec if inter_node.world_size > 1 else "none"
        return cls(
            inside=TwoShotPlan.build(
                "none", dtype, pieces_of(layout, places), intra_node.world_size, intra_node.rank, scatter=True
            ),
            share=Plan("none", dtype, starts, [share.numels[parameter] for parameter, _ in places]),
            share_numel=share_numel,
            between=TwoShotPlan.build(
                between_codec, value_dtype, pieces_of(share, share_places), inter_node.world_size, inter_node.rank
            ),
        )


def hierarchical_all_reduce(
    tensor: torch.Tensor,
    plan: HierarchicalPlan,
    intra_node: Group,
    inter_node: Group,
    scratch: Scratch,
    *,
    divisor: float,
    feedback: Feedback | None = None,
) -> None:
    """Replaces `tensor` by its sum over all ranks divided by `divisor`; only what leaves a node is compressed. Collective.

    1. all_to_all inside the node, uncompressed: every rank receives the node's values of its share.
    2. Sum the share in order of local ranks, in float32 (float64 for float64).
    3. compressed_all_reduce of the share among the ranks of equal local rank, one a node.
    4. all_gather inside the node, in the tensor's dtype.

    Args:
        tensor: one-dimensional, of the plan's dtype; overwritten.
        plan: from the same layout on all ranks.
        intra_node: ranks of this node.
        inter_node: ranks of equal local rank, in the order of nodes.
        scratch: reused.
        divisor: the number of all ranks for a mean, 1 for a sum.
        feedback: what codes between nodes have lost, on this rank; None for no error feedback.
    """
    scratches = Scratch(), scratch, scratch
    for step in hierarchical_all_reduce_steps(
        tensor, plan, intra_node, inter_node, intra_node, *scratches, divisor=divisor, feedback=feedback
    ):
        step()


def hierarchical_all_reduce_steps(
    tensor: torch.Tensor,
    plan: HierarchicalPlan,
    intra_node: Group,
    inter_node: Group,
    second_intra_node: Group,
    kept: Scratch,
    first: Scratch,
    second: Scratch,
    *,
    divisor: float,
    feedback: Feedback | None = None,
) -> list[Callable[[], None]]:
    """`hierarchical_all_reduce` cut in two, so that gathering one tensor overlaps the next one's sums.

    Args:
        tensor: overwritten by the second one.
        plan: from the same layout on all ranks.
        intra_node: ranks of this node; carries the messages of step 1.
        inter_node: ranks of equal local rank, in the order of nodes.
        second_intra_node: the ranks of `intra_node`; carries the messages of step 4.
        kept: of this tensor: its share and the share's code.
        first: for the first step alone, of several tensors in turn.
        second: for the second.
        divisor: the number of all ranks for a mean, 1 for a sum.
        feedback: what codes between nodes have lost, on this rank; None for no error feedback.
    """
    device, inside, stride_bytes = tensor.device, plan.inside, plan.inside.stride_bytes
    share = kept.values("share", plan.share_numel, plan.share.value_dtype, device)
    steps = compressed_all_reduce_steps(share, plan.between, inter_node, inter_node, kept, divisor=divisor, feedback=feedback)
    *before, last = steps

    def sum_up() -> None:
        sent = first.bytes("node sent", intra_node.world_size * stride_bytes, device)
        received = first.bytes("node received", intra_node.world_size * stride_bytes, device)
        operations.encode(inside.everything, tensor, sent)
        intra_node.all_to_all(received, sent, first)()  # (1)
        share.zero_()
        for k in range(intra_node.world_size):
            operations.decode_accumulate(plan.share, received[k * stride_bytes :], share)  # (2)
        for step in before:  # (3)
            step()

    def gather() -> None:
        last()
        rounded = second.values("rounded share", plan.share_numel, tensor.dtype, device)
        rounded.copy_(share)
        gathered = second.bytes("node gathered", second_intra_node.world_size * stride_bytes, device)
        message = gathered[second_intra_node.rank * stride_bytes :][:stride_bytes]
        operations.encode(plan.share, rounded, message)
        second_intra_node.all_gather(gathered, message, second)()  # (4)
        operations.decode(inside.everything, gathered, tensor)

    return [sum_up, gather]
