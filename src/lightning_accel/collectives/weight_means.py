"""Means of flat buffers of weights: over all ranks, and with one peer.

On the CPU they return when the result is there, on CUDA they enqueue on the current stream. Collective: all ranks of a group
call them in the same order.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from lightning_accel.native import DTYPES, kernels, run_kernel
from lightning_accel.transport.group import Group
from lightning_accel.transport.scratch import Scratch


def mean(
    buffer: torch.Tensor, group: Group, scratch: Scratch, between: Callable[[torch.Tensor], object] = lambda share: None
) -> None:
    """Replaces `buffer` by its mean over a group, or by what `between` makes of that. Collective.

    1. all_to_all: each rank receives all ranks' values of its share, 1/n of the buffer.
    2. The share's mean. The sum runs in rank order in float64 (float32 for 16-bit floats), so the mean of equal weights is the
       weight, to the bit (of float64, up to its last place).
    3. `between` works on the share: in a node, with the ranks of equal local rank, so that all carry what leaves the node.
    4. all_gather.

    Bytes sent by each of n ranks: 2 (n-1)/n of the buffer; messages: 2 to each other rank.

    Args:
        buffer: One-dimensional, of floating dtype and a size that is a multiple of the group's; overwritten.
        group: The ranks; one alone has the whole buffer for its share.
        scratch: Reused, as large as the buffer.
        between: Overwrites the mean of this rank's share.
    """
    n = group.world_size
    if n == 1:
        between(buffer)
        return
    share = buffer.view(n, buffer.numel() // n)[group.rank]
    rows = scratch.values("received", buffer.numel(), buffer.dtype, buffer.device)
    group.all_to_all(_bytes(rows), _bytes(buffer), scratch)()  # (1)
    mean_of_rows(rows, n, share)  # (2)
    between(share)  # (3)
    group.all_gather(_bytes(buffer), _bytes(share), scratch)()  # (4)


def mean_with(peer: int, buffer: torch.Tensor, group: Group, scratch: Scratch) -> None:
    """Replaces `buffer` by its mean with a peer's, which calls this with this rank as its peer.

    x <- high - (high - low) / 2, low being that of the lower rank: both get the same bits, and equal weights stay.

    Bytes sent: the buffer; messages: 1.

    Args:
        peer: Rank of the peer in the group.
        buffer: One-dimensional, of floating dtype; overwritten.
        group: A group with both ranks.
        scratch: Reused, as large as the buffer.
    """
    received = scratch.values("received", buffer.numel(), buffer.dtype, buffer.device)
    group.exchange(_bytes(received), _bytes(buffer), [peer], scratch)()
    low, high = (buffer, received) if group.rank < peer else (received, buffer)
    torch.lerp(low, high, 0.5, out=buffer)


def mean_of_rows(rows: torch.Tensor, count: int, out: torch.Tensor) -> None:
    """Overwrites `out` with the mean of `count` rows that lie one behind another in `rows`."""
    dtype = DTYPES.index(out.dtype)
    run_kernel(kernels.mean, out.device, dtype, rows.data_ptr(), count, out.data_ptr(), out.numel())


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(torch.uint8)
