"""Synchronous procedures on flat buffers of weights: their mean over all ranks, with a peer, and the ring's step.

As those of `collectives` they know no thread: on the CPU they return when the result is there, on CUDA they enqueue on the
current stream. Collective: all ranks of a group call them in the same order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from lightning_accel import _native, codecs
from lightning_accel.collectives import Group, Scratch
from lightning_accel.kernels import run_kernel


def mean(
    buffer: torch.Tensor, group: Group, scratch: Scratch, between: Callable[[torch.Tensor], object] = lambda share: None
) -> None:
    """Replaces `buffer` by its mean over a group, or by what `between` makes of that.

    1. all_to_all: each rank receives all ranks' values of its share, 1/n of the buffer.
    2. The share's mean. The sum runs in rank order in float64 (float32 for 16-bit floats), so the mean of equal weights is the
       weight, to the bit (of float64, up to its last place).
    3. `between` works on the share: in a node, with the ranks of equal local rank, so that all carry what leaves the node.
    4. all_gather.

    Bytes sent by each of n ranks: 2 (n-1)/n of the buffer; messages: 2.

    Args:
        buffer: one-dimensional, of floating dtype and a size that is a multiple of the group's; overwritten.
        group: the ranks; one alone has the whole buffer for its share.
        scratch: reused, as large as the buffer.
        between: overwrites the mean of this rank's share.
    """
    n = group.world_size
    if n == 1:
        between(buffer)
        return
    share = buffer.view(n, buffer.numel() // n)[group.rank]
    rows = scratch.values("received", buffer.numel(), buffer.dtype, buffer.device)
    group.all_to_all(_bytes(rows), _bytes(buffer), scratch)()  # (1)
    _mean_of_rows(rows, n, share)  # (2)
    between(share)  # (3)
    group.all_gather(_bytes(buffer), _bytes(share), scratch)()  # (4)


def mean_with(peer: int, buffer: torch.Tensor, group: Group, scratch: Scratch) -> None:
    """Replaces `buffer` by its mean with a peer's, which calls this with this rank as its peer.

    x <- high - (high - low) / 2, low being that of the lower rank: both get the same bits, and equal weights stay.

    Bytes sent: the buffer; messages: 1.

    Args:
        peer: rank in the group.
        buffer: one-dimensional, of floating dtype; overwritten.
        group: both are in.
        scratch: reused, as large as the buffer.
    """
    received = scratch.values("received", buffer.numel(), buffer.dtype, buffer.device)
    group.exchange(_bytes(received), _bytes(buffer), [peer], scratch)()
    low, high = (buffer, received) if group.rank < peer else (received, buffer)
    torch.lerp(low, high, 0.5, out=buffer)


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

    plan: codecs.Plan
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
        plan = codecs.Plan(codec, weights.dtype, offsets, numels)
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
        codecs.encode(self.plan, x, sent)  # (2)
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
            codecs.decode_accumulate(self.plan, message, replica)
        else:  # float64 by a codec whose values are float32
            codecs.decode(self.plan, message, spare)
            replica += spare


def _mean_of_rows(rows: torch.Tensor, count: int, out: torch.Tensor) -> None:
    dtype = codecs.DTYPES.index(out.dtype)
    run_kernel(_native.mean, out.device, dtype, rows.data_ptr(), count, out.data_ptr(), out.numel())


def _ring_difference(x: torch.Tensor, own: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    pointers = [tensor.data_ptr() for tensor in (x, own, left, right)]
    run_kernel(_native.ring_difference, x.device, codecs.DTYPES.index(x.dtype), *pointers, x.numel())


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(torch.uint8)
