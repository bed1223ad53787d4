"""Weights exchanged with the neighbours on a ring."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from lightning_accel import _native
from lightning_accel.compression import operations
from lightning_accel.compression.plan import Plan
from lightning_accel.native import DTYPES, run_kernel
from lightning_accel.transport.group import Group
from lightning_accel.transport.scratch import Scratch


@dataclass(frozen=True)
class Ring:
    """What a rank knows of the ring's weights: a replica of its own and of both neighbours'.

    Bitwise, always: `own` is the `right` of the rank to the left, and the `left` of the rank to the right. With two ranks both
    neighbours are the same.

    Attributes:
        plan: of a message; blocks begin where parameters do.
        own: w, one-dimensional, float32 or float64, and so the others.
        left: L, the replica of rank r - 1.
        right: R, that of rank r + 1.
    """

    plan: Plan
    own: torch.Tensor
    left: torch.Tensor
    right: torch.Tensor

    @classmethod
    def of(cls, codec: str, weights: torch.Tensor, offsets: Sequence[int], numels: Sequence[int]) -> Ring:
        """Makes all replicas from weights that are equal on all ranks.

        Args:
            codec: of messages.
            weights: one-dimensional, float32 or float64.
            offsets: where each parameter starts in it.
            numels: elements of each.
        """
        plan = Plan(codec, weights.dtype, offsets, numels)
        return cls(plan, weights.clone(), weights.clone(), weights.clone())

    def reset(self, weights: torch.Tensor) -> None:
        """Overwrites all replicas with weights that are equal on all ranks."""
        for replica in (self.own, self.left, self.right):
            replica.copy_(weights)

    def step(self, x: torch.Tensor, group: Group, scratch: Scratch) -> None:
        """Replaces weights by what their neighbours and their own progress make of them.

        1. d = (x - w) + ((L - w) + (R - w)) / 3, that is x + L/3 + R/3 - 5w/3.
        2. Encode it, and send Q(d) to both neighbours.
        3. L += Q of the left one, R += Q of the right one, w += Q(d), x = w.

        Bytes sent: 2 messages, 1 if there are two ranks.

        Args:
            x: this rank's weights, as `own`; overwritten.
            group: the ring, two ranks or more.
            scratch: reused, 3 messages.
        """
        wire_bytes = self.plan.wire_bytes
        _ring_difference(x, self.own, self.left, self.right)  # (1)
        sent = scratch.bytes("sent", wire_bytes, x.device)
        operations.encode(self.plan, x, sent)  # (2)
        neighbours = sorted({(group.rank - 1) % group.world_size, (group.rank + 1) % group.world_size})
        received = scratch.bytes("received", len(neighbours) * wire_bytes, x.device)
        group.exchange(received, sent, neighbours, scratch)()
        of_rank = dict(zip(neighbours, received.view(len(neighbours), wire_bytes), strict=True))
        self._add(of_rank[(group.rank - 1) % group.world_size], self.left, x)  # (3)
        self._add(of_rank[(group.rank + 1) % group.world_size], self.right, x)
        self._add(sent, self.own, x)
        x.copy_(self.own)

    def _add(self, message: torch.Tensor, replica: torch.Tensor, spare: torch.Tensor) -> None:
        if replica.dtype == self.plan.value_dtype:
            operations.decode_accumulate(self.plan, message, replica)
        else:  # float64 by a codec whose values are float32
            operations.decode(self.plan, message, spare)
            replica += spare


def _ring_difference(x: torch.Tensor, own: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    pointers = [tensor.data_ptr() for tensor in (x, own, left, right)]
    run_kernel(_native.ring_difference, x.device, DTYPES.index(x.dtype), *pointers, x.numel())
