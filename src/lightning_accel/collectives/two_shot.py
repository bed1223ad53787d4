"""Synchronous procedures on explicit tensors, a group and scratch memory.

They know no bucket, no DDP and no thread: on the CPU they return when the result is there, on CUDA they enqueue on the current
stream. Every function here is collective: all ranks of the group call it, in the same order, with plans made from the same
layout.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from lightning_accel.collectives.message_plan import TwoShotPlan
from lightning_accel.compression import operations
from lightning_accel.compression.error_feedback import Feedback
from lightning_accel.transport.group import Group, Wait
from lightning_accel.transport.scratch import Scratch


def compressed_all_reduce(
    tensor: torch.Tensor, plan: TwoShotPlan, group: Group, scratch: Scratch, *, divisor: float, feedback: Feedback | None = None
) -> None:
    """Replaces `tensor` by its sum over the group divided by `divisor`, quantising each element exactly twice. Collective.

    1. Encode every rank's blocks into its message.
    2. all_to_all: rank k receives all ranks' codes of the blocks it owns.
    3. Decode them, sum in rank order 0..n-1 in float32, divide, encode: the second and last quantisation.
    4. all_gather: every rank receives the codes of all means.
    5. Decode them, the own ones too, so that all ranks end bit-identical.

    With error feedback, (1) codes what rank r has to send plus what its earlier codes have lost, and (3) likewise.

    Bytes sent by each rank: 2 (n-1) messages of about 1/n of the tensor's code; messages: 2.

    Two ranks would send half of the code twice; they send all of it once, in step 2, and both sum all blocks. The bits and the
    bytes are the same, and there is one message less to wait for.

    Args:
        tensor: one-dimensional, of the plan's dtype; overwritten. Elements outside the plan keep their value.
        plan: the same layout on all ranks.
        group: the ranks.
        scratch: reused, twice the code; nothing is allocated once it has grown.
        divisor: the number of ranks for a mean, 1 for a sum.
        feedback: what codes have lost, on this rank; None for no error feedback.
    """
    for step in compressed_all_reduce_steps(tensor, plan, group, group, scratch, divisor=divisor, feedback=feedback):
        step()


def compressed_all_reduce_steps(
    tensor: torch.Tensor,
    plan: TwoShotPlan,
    first: Group,
    second: Group,
    scratch: Scratch,
    *,
    divisor: float,
    feedback: Feedback | None = None,
) -> list[Callable[[], None]]:
    """`compressed_all_reduce` cut where it would wait, to be run one after the other.

    Each starts a message and the next one waits for it, so several tensors can be under way, each with its own scratch, if
    the same step of all of them runs in one order on all ranks. Two ranks need two steps, more need three.

    Args:
        tensor: overwritten by the last one.
        plan: the same layout on all ranks.
        first: carries the messages of step 2.
        second: the same ranks; carries those of step 4.
        scratch: of this tensor, until the last one is done.
        divisor: the number of ranks for a mean, 1 for a sum.
        feedback: what codes have lost, on this rank; None for no error feedback.
    """
    n, rank, stride_bytes = first.world_size, first.rank, plan.stride_bytes
    waits: list[Wait] = []
    worker, server = (feedback.worker, feedback.server) if feedback is not None else (None, None)
    received = scratch.bytes("received", n * stride_bytes, tensor.device)

    def sum_up(mean: torch.Tensor) -> None:
        operations.decode_sum_encode(
            plan.own, received, mean, count=n, stride_bytes=stride_bytes, divisor=divisor, residuals=server
        )

    if plan.is_whole:
        own = received[rank * stride_bytes :][:stride_bytes]

        def encode_whole() -> None:
            operations.encode(plan.everything, tensor, own, worker)  # (1)
            waits.append(first.all_gather(received, own, scratch))  # (2)

        def sum_whole() -> None:
            waits.pop()()
            sum_up(own)  # (3)
            operations.decode(plan.everything, own, tensor)  # (5)

        return [encode_whole, sum_whole]

    sent = scratch.bytes("sent", n * stride_bytes, tensor.device)

    def encode() -> None:
        operations.encode(plan.everything, tensor, sent, worker)  # (1)
        waits.append(first.all_to_all(received, sent, scratch))  # (2)

    def sum_own() -> None:
        waits.pop()()
        mean = sent[rank * stride_bytes :][:stride_bytes]  # all has been sent from there
        sum_up(mean)  # (3)
        waits.append(second.all_gather(sent, mean, scratch))  # (4)

    def decode() -> None:
        waits.pop()()
        operations.decode(plan.everything, sent, tensor)  # (5)

    return [encode, sum_own, decode]
