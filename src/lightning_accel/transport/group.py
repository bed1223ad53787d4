"""Messages among the ranks of a process group."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist

from lightning_accel.transport import gloo
from lightning_accel.transport.gloo import Wait
from lightning_accel.transport.scratch import Scratch

# torch 2.13 renamed the functions that gather into one tensor; the old names warn there.
_all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


def ring_bytes(tensor: torch.Tensor, world_size: int) -> int:
    """Returns the bytes that each rank sends in an uncompressed ring all_reduce of a tensor."""
    return 2 * (world_size - 1) * tensor.numel() * tensor.element_size() // world_size


class Group:
    """A process group with what collectives need to know of it, and a count of what this rank sent.

    Where gloo carries CUDA tensors, messages are staged through pinned host memory, so only a thread that may wait should
    call.

    Args:
        process_group: The group; None for one rank by itself.

    Attributes:
        rank: This process's rank in the group.
        world_size: Number of ranks in the group.
        sent_bytes: Bytes this rank has sent to others in this group.
    """

    def __init__(self, process_group: dist.ProcessGroup | None) -> None:
        self.process_group = process_group
        self.rank = dist.get_rank(process_group) if process_group is not None else 0
        self.world_size = dist.get_world_size(process_group) if process_group is not None else 1
        self.sent_bytes = 0

    def all_to_all(self, received: torch.Tensor, sent: torch.Tensor, scratch: Scratch) -> Wait:
        """Sends part k of `sent` to rank k, and receives part k of `received` from it. Equal parts, uint8. Collective.

        It only starts: what is returned waits. Until then memory and scratch are in use.
        """
        self.sent_bytes += sent.numel() // self.world_size * (self.world_size - 1)
        process_group = self.process_group  # read once: a failure takes it away at any moment, and to torch None is the world
        if process_group is None:
            return self._copy_alone(received, sent)
        if sent.is_cuda and not gloo.is_staged(process_group, sent):
            dist.all_to_all_single(received, sent, group=process_group)
            return _on_this_stream
        return self._send_to_all(process_group, received, sent, scratch, self._parts)

    def all_gather(self, gathered: torch.Tensor, sent: torch.Tensor, scratch: Scratch) -> Wait:
        """Overwrites `gathered` with every rank's `sent`, in rank order, uint8. Collective.

        `sent` may be its place in `gathered`. It only starts: what is returned waits. Until then memory and scratch are in use.
        """
        self.sent_bytes += sent.numel() * (self.world_size - 1)
        process_group = self.process_group
        if process_group is None:
            return self._copy_alone(gathered, sent)
        if sent.is_cuda and not gloo.is_staged(process_group, sent):
            _all_gather_single(gathered, sent, group=process_group)
            return _on_this_stream
        return self._send_to_all(process_group, gathered, sent, scratch, lambda message: [message] * self.world_size)

    def exchange(self, received: torch.Tensor, sent: torch.Tensor, peers: Sequence[int], scratch: Scratch) -> Wait:
        """Sends `sent` to each of `peers`, and receives part k of `received` from peers[k], which call this alike. uint8.

        It only starts: what is returned waits. Until then memory and scratch are in use.
        """
        self.sent_bytes += sent.numel() * len(peers)
        process_group = self._open_group()
        if not sent.numel():
            return _on_this_stream
        is_staged = gloo.is_staged(process_group, sent)
        received, sent, copy_back = gloo.stage(received, sent, scratch) if is_staged else (received, sent, _on_this_stream)
        parts = received.view(len(peers), -1).unbind()
        # As one batch: on NCCL a receive of its own would wait for the peer's send, which waits behind its own receive.
        operations = [
            dist.P2POp(dist.irecv, part, group=process_group, group_peer=k) for part, k in zip(parts, peers, strict=True)
        ]
        operations += [dist.P2POp(dist.isend, sent, group=process_group, group_peer=k) for k in peers]
        works = dist.batch_isend_irecv(operations)

        def wait() -> None:
            for work in works:
                work.wait()
            copy_back()

        return wait

    def broadcast(self, tensor: torch.Tensor) -> None:
        """Overwrites every rank's `tensor` with rank 0's, uint8. Collective."""
        if self.world_size == 1 or not tensor.numel():
            return
        process_group = self._open_group()
        self.sent_bytes += tensor.numel() if self.rank == 0 else 0
        dist.broadcast(tensor, group=process_group, group_src=0)

    def all_reduce(self, tensor: torch.Tensor, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> dist.Work:
        """Starts the backend's own all_reduce of a tensor, in place. Collective."""
        self.sent_bytes += ring_bytes(tensor, self.world_size)
        work: dist.Work | None = dist.all_reduce(tensor, op=op, group=self._open_group(), async_op=True)
        assert work is not None
        return work

    def abort(self) -> None:
        """Closes gloo's connections: what waits for one of them fails now, on this rank and on others. Not collective."""
        if (process_group := self.process_group) is not None:
            gloo.abort(process_group, self.rank, self.world_size)

    def _open_group(self) -> dist.ProcessGroup:
        if (process_group := self.process_group) is None:
            raise RuntimeError("the group was closed")
        return process_group

    def _send_to_all(
        self,
        process_group: dist.ProcessGroup,
        received: torch.Tensor,
        sent: torch.Tensor,
        scratch: Scratch,
        parts_of: Callable[[torch.Tensor], Sequence[torch.Tensor]],
    ) -> Wait:
        if not received.numel():
            return _on_this_stream
        received, sent, copy_back = gloo.stage(received, sent, scratch)
        arrive = gloo.send_to_all(process_group, self._parts(received), parts_of(sent), self.rank)

        def wait() -> None:
            arrive()
            copy_back()

        return wait

    def _copy_alone(self, received: torch.Tensor, sent: torch.Tensor) -> Wait:
        if self.world_size > 1:
            raise RuntimeError("the group was closed")
        received.copy_(sent)
        return _on_this_stream

    def _parts(self, message: torch.Tensor) -> list[torch.Tensor]:
        """Returns one equal part for each rank."""
        return list(message.view(self.world_size, -1).unbind())


def _on_this_stream() -> None:
    """Waits for nothing: on a GPU what follows on the stream comes after, elsewhere the message is there."""
