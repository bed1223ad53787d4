"""reduce_scatter and all_gather with coded messages; the compressed all_reduce (`two_shot`) is made of both.

A rank's *shard* is what it owns of a tensor: the pieces of its plan as one dense tensor.

Functions named `..._steps` are cut where they would wait for a message: they are generators, and each `next` runs up to the
next wait. So several tensors can be under way, each with scratch memory of its own, if the same part of all of them runs in
one order on all ranks. Nothing happens before the first `next`; `finish` runs what is left.
"""

from __future__ import annotations

from collections.abc import Generator

import torch

from lightning_accel.collectives.message_plan import TwoShotPlan
from lightning_accel.compression import operations
from lightning_accel.compression.error_feedback import Residuals
from lightning_accel.transport.group import Group
from lightning_accel.transport.scratch import Scratch

Steps = Generator[None, None, None]
"""A collective that is cut where it would wait."""


def finish(steps: Steps) -> None:
    """Runs what is left of a collective."""
    for _ in steps:
        pass


def reduce_scatter_steps(
    tensor: torch.Tensor, plan: TwoShotPlan, shard: torch.Tensor, group: Group, scratch: Scratch, *, divisor: float = 1.0
) -> Steps:
    """Overwrites `shard` with this rank's part of the sum over the group divided by `divisor`. Collective.

    1. Encode every rank's blocks into its message: each element is quantised once.
    2. all_to_all: rank k receives all ranks' codes of the blocks it owns.
    3. Decode them, sum in rank order 0..n-1 in float32 (float64 with codec `none` for float64), divide.

    Bytes sent by each of n ranks: n-1 messages of about 1/n of the tensor's code; messages: 1 to each other rank.

    Args:
        tensor: One-dimensional, of the plan's dtype.
        plan: Built with `scatter=True` from the same layout on all ranks.
        shard: One-dimensional, `plan.shard_numel` elements of `plan.shard.value_dtype`; overwritten.
        group: The ranks.
        scratch: Reused, twice the code.
        divisor: Number of ranks for a mean, 1 for a sum.
    """
    received = yield from exchange_codes(tensor, plan, group, scratch)  # (1), (2)
    shard.zero_()
    for k in range(group.world_size):
        operations.decode_accumulate(plan.shard, received[k * plan.stride_bytes :], shard)  # (3)
    if divisor != 1:
        shard.div_(divisor)


def all_gather_steps(shard: torch.Tensor, plan: TwoShotPlan, tensor: torch.Tensor, group: Group, scratch: Scratch) -> Steps:
    """Overwrites `tensor` with all ranks' shards. Collective.

    1. Encode this rank's shard.
    2. all_gather: every rank receives all codes.
    3. Decode them, the own one too, so that all ranks end bit-identical.

    Bytes sent by each of n ranks: n-1 messages of about 1/n of the tensor's code; messages: 1 to each other rank.

    Args:
        shard: One-dimensional, `plan.shard_numel` elements of the plan's dtype.
        plan: Built with `scatter=True` from the same layout on all ranks.
        tensor: One-dimensional, of the plan's dtype; overwritten. Elements outside the plan keep their value.
        group: The ranks.
        scratch: Reused, the code.
    """
    gathered = scratch.bytes("gathered", group.world_size * plan.stride_bytes, tensor.device)
    message = message_of(group.rank, plan, gathered)
    operations.encode(plan.shard, shard, message)  # (1)
    yield from gather_codes(message, plan, gathered, tensor, group, scratch)  # (2), (3)


def exchange_codes(
    tensor: torch.Tensor, plan: TwoShotPlan, group: Group, scratch: Scratch, residuals: Residuals | None = None
) -> Generator[None, None, torch.Tensor]:
    """Encodes a tensor and gives every rank the codes of what it sums: the first half of a two-shot all_reduce.

    Returns:
        All ranks' messages, `plan.stride_bytes` apart, in rank order, in scratch memory "received".
    """
    n = group.world_size
    received = scratch.bytes("received", n * plan.stride_bytes, tensor.device)
    if plan.is_whole:
        own = message_of(group.rank, plan, received)
        operations.encode(plan.everything, tensor, own, residuals)
        wait = group.all_gather(received, own, scratch)
    else:
        sent = scratch.bytes("sent", n * plan.stride_bytes, tensor.device)
        operations.encode(plan.everything, tensor, sent, residuals)
        wait = group.all_to_all(received, sent, scratch)
    yield
    wait()
    return received


def gather_codes(
    message: torch.Tensor, plan: TwoShotPlan, gathered: torch.Tensor, tensor: torch.Tensor, group: Group, scratch: Scratch
) -> Steps:
    """Gives every rank all ranks' messages, and decodes them into `tensor`: the second half of a two-shot all_reduce.

    `message` may be this rank's place in `gathered`. Where every rank sums all, nothing is sent.
    """
    if plan.is_whole:
        operations.decode(plan.everything, message, tensor)
        return
    wait = group.all_gather(gathered, message, scratch)
    yield
    wait()
    operations.decode(plan.everything, gathered, tensor)


def message_of(rank: int, plan: TwoShotPlan, messages: torch.Tensor) -> torch.Tensor:
    """Returns the part of `messages` that is a rank's."""
    return messages[rank * plan.stride_bytes :][: plan.stride_bytes]
