"""The compressed all_reduce: each element is quantised exactly twice, whatever the number of ranks.

It knows no bucket, no DDP and no thread: on the CPU it returns when the result is there, on CUDA it enqueues on the current
stream. All ranks of the group call it in the same order, with plans made from the same layout.
"""

from __future__ import annotations

import torch

from lightning_accel.collectives.message_plan import TwoShotPlan
from lightning_accel.collectives.sharded import Steps, exchange_codes, finish, gather_codes, message_of
from lightning_accel.compression import operations
from lightning_accel.compression.error_feedback import Feedback
from lightning_accel.transport.group import Group
from lightning_accel.transport.scratch import Scratch


def compressed_all_reduce(
    tensor: torch.Tensor, plan: TwoShotPlan, group: Group, scratch: Scratch, *, divisor: float, feedback: Feedback | None = None
) -> None:
    """Runs `compressed_all_reduce_steps` to its end, in one group. Collective."""
    finish(compressed_all_reduce_steps(tensor, plan, group, group, scratch, divisor=divisor, feedback=feedback))


def compressed_all_reduce_steps(
    tensor: torch.Tensor,
    plan: TwoShotPlan,
    first: Group,
    second: Group,
    scratch: Scratch,
    *,
    divisor: float,
    feedback: Feedback | None = None,
) -> Steps:
    """Replaces `tensor` by its sum over the group divided by `divisor`. Collective; cut into `plan.phases`.

    1. Encode every rank's blocks into its message.
    2. all_to_all: rank k receives all ranks' codes of the blocks it owns.
    3. Decode them, sum in rank order 0..n-1 in float32, divide, encode: the second and last quantisation.
    4. all_gather: every rank receives the codes of all means.
    5. Decode them, the own ones too, so that all ranks end bit-identical.

    With error feedback, (1) codes what rank r has to send plus what its earlier codes have lost, and (3) likewise. Two ranks
    both sum all blocks (see `Sums`): then (2) is an all_gather, and (4) is not needed.

    Bytes sent by each of n ranks: 2 (n-1) messages of about 1/n of the tensor's code; messages: 2 to each other rank.

    Args:
        tensor: One-dimensional, of the plan's dtype; overwritten. Elements outside the plan keep their value.
        plan: Messages, from the same layout on all ranks.
        first: The ranks; carries the messages of step 2.
        second: The same ranks; carries those of step 4.
        scratch: Memory of this tensor alone, until the last part is done: twice the code. Nothing is allocated once it has grown.
        divisor: Number of ranks for a mean, 1 for a sum.
        feedback: What codes have lost, on this rank; None for no error feedback.
    """
    worker, server = (feedback.worker, feedback.server) if feedback is not None else (None, None)
    received = yield from exchange_codes(tensor, plan, first, scratch, worker)  # (1), (2)
    # The mean takes the place of a message that is done with: this rank's own, or one that has been sent.
    messages = received if plan.is_whole else scratch.bytes("sent", received.numel(), tensor.device)
    mean = message_of(first.rank, plan, messages)
    operations.decode_sum_encode(  # (3)
        plan.own,
        received,
        mean,
        count=first.world_size,
        stride_bytes=plan.stride_bytes,
        divisor=divisor,
        residuals=server,
    )
    yield from gather_codes(mean, plan, messages, tensor, second, scratch)  # (4), (5)
