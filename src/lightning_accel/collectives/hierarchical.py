"""The all_reduce by nodes: uncompressed inside a node, compressed between nodes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from lightning_accel.collectives.message_plan import TwoShotPlan, pieces_of
from lightning_accel.collectives.sharded import Steps, all_gather_steps, finish, reduce_scatter_steps
from lightning_accel.collectives.two_shot import compressed_all_reduce_steps
from lightning_accel.compression.block_layout import Layout
from lightning_accel.compression.error_feedback import Feedback
from lightning_accel.transport.group import Group
from lightning_accel.transport.scratch import Scratch


@dataclass(frozen=True)
class HierarchicalPlan:
    """Messages of one tensor in a hierarchical all_reduce, for one rank.

    Attributes:
        inside: The tensor among the ranks of a node, uncompressed.
        between: This rank's shard of it among the ranks of equal local rank.
    """

    inside: TwoShotPlan
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
        """Plans the messages of a tensor that holds parameters.

        Args:
            codec: Codec between nodes.
            dtype: Dtype of the tensor.
            layout: Parameters, with the ranks of a node as owners.
            share: This rank's share of the layout, with nodes as owners.
            places: Pairs of a parameter's place in the layout and its first element in the tensor.
            intra_node: Ranks of this node.
            inter_node: Ranks of equal local rank, in the order of nodes.
        """
        share_places = []
        share_numel = 0
        for parameter, _ in places:
            share_places.append((parameter, share_numel))
            share_numel += share.numels[parameter]
        value_dtype = torch.float64 if dtype == torch.float64 else torch.float32
        # Nothing is quantised where nothing leaves the node.
        between_codec = codec if inter_node.world_size > 1 else "none"
        ranks, nodes = (intra_node.world_size, intra_node.rank), (inter_node.world_size, inter_node.rank)
        return cls(
            inside=TwoShotPlan.build("none", dtype, pieces_of(layout, places), *ranks, scatter=True),
            between=TwoShotPlan.build(between_codec, value_dtype, pieces_of(share, share_places), *nodes),
        )

    @property
    def phases(self) -> tuple[str, ...]:
        """Names of the parts between which `hierarchical_all_reduce_steps` is cut."""
        return "reduce", "gather"


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
) -> Steps:
    """Replaces `tensor` by its sum over all ranks divided by `divisor`; only what leaves a node is compressed. Collective.

    1. reduce_scatter inside the node, uncompressed: every rank gets the node's sum of its shard, added in order of local
       ranks, in float32 (float64 for float64).
    2. compressed_all_reduce of the shard among the ranks of equal local rank, one a node.
    3. all_gather inside the node, in the tensor's dtype.

    It is cut in two, so that gathering one tensor overlaps the next one's sums.

    Args:
        tensor: One-dimensional, of the plan's dtype; overwritten by the second part.
        plan: Messages, from the same layout on all ranks.
        intra_node: Ranks of this node; carries the messages of step 1.
        inter_node: Ranks of equal local rank, in the order of nodes.
        second_intra_node: The ranks of `intra_node`; carries the messages of step 3.
        kept: Memory of this tensor alone: its shard and the shard's code.
        first: Memory of the first part, of several tensors in turn.
        second: Memory of the second part.
        divisor: Number of all ranks for a mean, 1 for a sum.
        feedback: What codes between nodes have lost, on this rank; None for no error feedback.
    """
    shard = kept.values("shard", plan.inside.shard_numel, plan.inside.shard.value_dtype, tensor.device)
    finish(reduce_scatter_steps(tensor, plan.inside, shard, intra_node, first))  # (1)
    groups = inter_node, inter_node
    between = compressed_all_reduce_steps(shard, plan.between, *groups, kept, divisor=divisor, feedback=feedback)  # (2)
    for _ in plan.between.phases[1:]:
        next(between)
    yield  # its last message is waited for in the second part
    finish(between)
    rounded = second.values("rounded shard", shard.numel(), tensor.dtype, tensor.device)
    rounded.copy_(shard)
    finish(all_gather_steps(rounded, plan.inside, tensor, second_intra_node, second))  # (3)
