"""Weights exchanged with the two neighbours on a ring, as coded differences from estimates."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from lightning_accel.compression import operations
from lightning_accel.compression.plan import Plan
from lightning_accel.native import DTYPES, kernels, run_kernel
from lightning_accel.transport.group import Group
from lightning_accel.transport.scratch import Scratch


@dataclass(frozen=True)
class Ring:
    """What a rank knows of the ring's weights: estimates of its own and of both neighbours'.

    Bitwise, always: `own` is the `right` of the rank to the left, and the `left` of the rank to the right. With two ranks both
    neighbours are the same.

    Attributes:
        plan: Plan of a message; blocks begin where parameters do.
        own: w, one-dimensional, float32 or float64, and so the others.
        left: L, the estimate of rank r - 1.
        right: R, the estimate of rank r + 1.
    """

    plan: Plan
    own: torch.Tensor
    left: torch.Tensor
    right: torch.Tensor

    @classmethod
    def of(cls, codec: str, weights: torch.Tensor, offsets: Sequence[int], numels: Sequence[int]) -> Ring:
        """Makes all estimates from weights that are equal on all ranks.

        Args:
            codec: Codec of messages.
            weights: One-dimensional, float32 or float64.
            offsets: First element of each parameter in `weights`.
            numels: Elements of each.
        """
        plan = Plan(codec, weights.dtype, offsets, numels)
        return cls(plan, weights.clone(), weights.clone(), weights.clone())

    def reset(self, weights: torch.Tensor) -> None:
        """Overwrites all estimates with weights that are equal on all ranks."""
        for estimate in (self.own, self.left, self.right):
            estimate.copy_(weights)

    def step(self, x: torch.Tensor, group: Group, scratch: Scratch) -> None:
        """Replaces weights by what their neighbours and their own progress make of them. Collective.

        1. d = (x - w) + ((L - w) + (R - w)) / 3, that is x + L/3 + R/3 - 5w/3.
        2. Encode it, and send Q(d) to both neighbours.
        3. L += Q of the left one, R += Q of the right one, w += Q(d), x = w.

        Bytes sent: 2 messages, 1 if there are two ranks.

        Args:
            x: This rank's weights, as `own`; overwritten.
            group: The ring, two ranks or more.
            scratch: Reused, 3 messages.
        """
        wire_bytes = self.plan.wire_bytes
        difference_to_neighbours(x, self.own, self.left, self.right)  # (1)
        sent = scratch.bytes("sent", wire_bytes, x.device)
        operations.encode(self.plan, x, sent)  # (2)
        neighbours = sorted({(group.rank - 1) % group.world_size, (group.rank + 1) % group.world_size})
        received = scratch.bytes("received", len(neighbours) * wire_bytes, x.device)
        group.exchange(received, sent, neighbours, scratch)()
        messages = dict(zip(neighbours, received.view(len(neighbours), wire_bytes), strict=True))
        self._add(messages[(group.rank - 1) % group.world_size], self.left, x)  # (3)
        self._add(messages[(group.rank + 1) % group.world_size], self.right, x)
        self._add(sent, self.own, x)
        x.copy_(self.own)

    def _add(self, message: torch.Tensor, estimate: torch.Tensor, spare: torch.Tensor) -> None:
        if estimate.dtype == self.plan.value_dtype:
            operations.decode_accumulate(self.plan, message, estimate)
        else:  # float64 by a codec whose values are float32
            operations.decode(self.plan, message, spare)
            estimate += spare


def difference_to_neighbours(x: torch.Tensor, own: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    """Overwrites x with (x - own) + ((left - own) + (right - own)) / 3."""
    pointers = [tensor.data_ptr() for tensor in (x, own, left, right)]
    run_kernel(kernels.ring_difference, x.device, DTYPES.index(x.dtype), *pointers, x.numel())
