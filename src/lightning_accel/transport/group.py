"""Messages among the ranks of a process group."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from datetime import timedelta

import torch
import torch.distributed as dist

from lightning_accel.transport.scratch import Scratch

# torch 2.13 renamed the functions that gather into one tensor; the old names warn there.
_all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


_CPU = torch.device("cpu")


_MAX_INTERFACES = 4
"""Network interfaces that gloo is expected to use at most."""


Wait = Callable[[], None]
"""Waits for a message that was started; raises if it failed."""


def backend_of(process_group: dist.ProcessGroup, device: torch.device) -> str:
    """Name of the backend that carries tensors of `device`, such as "gloo" or "nccl"."""
    config = dist.get_backend_config(process_group)
    backends = dict(item.split(":") for item in config.split(",")) if ":" in config else {}
    return str(backends.get(device.type, config))


class Group:
    """A process group with what the procedures need to know of it, and a count of what they sent.

    Where gloo carries CUDA tensors, messages are staged through pinned host memory, so only a thread that may wait should
    call.

    Args:
        process_group: the group; None for one rank by itself.

    Attributes:
        rank: in the group.
        world_size: of the group.
        sent_bytes: bytes this rank has sent to others in this group.
    """

    def __init__(self, process_group: dist.ProcessGroup | None) -> None:
        self.process_group = process_group
        self.rank = dist.get_rank(process_group) if process_group is not None else 0
        self.world_size = dist.get_world_size(process_group) if process_group is not None else 1
        self.sent_bytes = 0

    def all_to_all(self, received: torch.Tensor, sent: torch.Tensor, scratch: Scratch) -> Wait:
        """Part k of `sent` goes to rank k; part k of `received` comes from rank k. Equal parts, uint8.

        Starts it; what is returned waits for it. Until then memory and scratch are in use.
        """
        self.sent_bytes += sent.numel() // self.world_size * (self.world_size - 1)
        process_group = self.process_group  # read once: a failure takes it away at any moment, and to torch None is the world
        if process_group is None:
            return self._copy_alone(received, sent)
        if sent.is_cuda and not _is_staged(process_group, sent):
            dist.all_to_all_single(received, sent, group=process_group)
            return _on_this_stream
        return self._exchange(process_group, received, sent, scratch, lambda message: _parts(message, self))

    def all_gather(self, gathered: torch.Tensor, sent: torch.Tensor, scratch: Scratch) -> Wait:
        """`gathered` becomes every rank's `sent`, in rank order, uint8; `sent` may be its place in `gathered`.

        Starts it; what is returned waits for it. Until then memory and scratch are in use.
        """
        self.sent_bytes += sent.numel() * (self.world_size - 1)
        process_group = self.process_group
        if process_group is None:
            return self._copy_alone(gathered, sent)
        if sent.is_cuda and not _is_staged(process_group, sent):
            _all_gather_single(gathered, sent, group=process_group)
            return _on_this_stream
        return self._exchange(process_group, gathered, sent, scratch, lambda message: [message] * self.world_size)

    def exchange(self, received: torch.Tensor, sent: torch.Tensor, peers: Sequence[int], scratch: Scratch) -> Wait:
        """`sent` goes to each of `peers`, and part k of `received` comes from peers[k], which call this alike. uint8.

        Starts it; what is returned waits for it. Until then memory and scratch are in use.
        """
        self.sent_bytes += sent.numel() * len(peers)
        process_group = self.process_group
        if process_group is None:
            raise RuntimeError("the group was closed")
        if not sent.numel():
            return _on_this_stream
        is_staged = _is_staged(process_group, sent)
        host_received = scratch.pinned("received", received.numel()) if is_staged else received
        host_sent = scratch.pinned("sent", sent.numel()).copy_(sent) if is_staged else sent
        parts = host_received.view(len(peers), -1).unbind()
        # As one batch: on NCCL a receive of its own would wait for the peer's send, which waits behind its own receive.
        operations = [
            dist.P2POp(dist.irecv, part, group=process_group, group_peer=k) for part, k in zip(parts, peers, strict=True)
        ]
        operations += [dist.P2POp(dist.isend, host_sent, group=process_group, group_peer=k) for k in peers]
        works = dist.batch_isend_irecv(operations)

        def wait() -> None:
            for work in works:
                work.wait()
            if is_staged:
                received.copy_(host_received)

        return wait

    def broadcast(self, tensor: torch.Tensor) -> None:
        """Every rank gets rank 0's `tensor`, uint8."""
        process_group = self.process_group
        if self.world_size == 1 or not tensor.numel():
            return
        if process_group is None:
            raise RuntimeError("the group was closed")
        self.sent_bytes += tensor.numel() if self.rank == 0 else 0
        dist.broadcast(tensor, group=process_group, group_src=0)

    def abort(self) -> None:
        """Closes connections: what waits for one of them fails now, on this rank and on others. Not collective; gloo only.

        gloo has no such call, but a receive that runs out of time closes all connections of its context.
        """
        process_group = self.process_group
        if process_group is None or backend_of(process_group, _CPU) != "gloo":
            return
        # torch deals tags to contexts in turn, one for each network interface; tag 0 is that of messages.
        for tag in range(1, 1 + _MAX_INTERFACES):
            for k in range(1, self.world_size):
                peer = (self.rank + k) % self.world_size
                try:
                    work = dist.irecv(torch.empty(1, dtype=torch.uint8), group=process_group, group_src=peer, tag=tag)
                except RuntimeError:
                    continue  # this connection is closed already, others may not be
                with contextlib.suppress(RuntimeError):
                    assert work is not None
                    work.wait(timedelta(milliseconds=1))

    def _exchange(
        self,
        process_group: dist.ProcessGroup,
        received: torch.Tensor,
        sent: torch.Tensor,
        scratch: Scratch,
        parts: Callable[[torch.Tensor], Sequence[torch.Tensor]],
    ) -> Wait:
        """Sends `parts(sent)[k]` to rank k and receives part k of `received` from it, all at once and both ways at once.

        Receives are posted first: gloo tells a sender that it may send on the connection that carries the data, and with
        its own all_to_all and all_gather a late rank's word queues behind its own message, which doubles the time.
        """
        if not received.numel():
            return _on_this_stream
        is_staged = sent.is_cuda
        host_received = scratch.pinned("received", received.numel()) if is_staged else received
        host_sent = scratch.pinned("sent", sent.numel()).copy_(sent) if is_staged else sent
        from_ranks, to_ranks = _parts(host_received, self), parts(host_sent)
        n, rank = self.world_size, self.rank
        works = [dist.irecv(from_ranks[k], group=process_group, group_src=k) for k in range(n) if k != rank]
        # Each rank begins with its next neighbour, so that no rank is everybody's first target.
        works += [dist.isend(to_ranks[(rank + k) % n], group=process_group, group_dst=(rank + k) % n) for k in range(1, n)]
        if from_ranks[rank].data_ptr() != to_ranks[rank].data_ptr():
            from_ranks[rank].copy_(to_ranks[rank])

        def wait() -> None:
            for work in works:
                assert work is not None
                work.wait()
            if is_staged:
                received.copy_(host_received)

        return wait

    def _copy_alone(self, received: torch.Tensor, sent: torch.Tensor) -> Wait:
        if self.world_size > 1:
            raise RuntimeError("the group was closed")
        received.copy_(sent)
        return _on_this_stream


def _on_this_stream() -> None:
    """Nothing to wait for: on a GPU what follows on the stream comes after, elsewhere the message is there."""


def _parts(message: torch.Tensor, group: Group) -> list[torch.Tensor]:
    """One equal part for each rank."""
    return list(message.view(group.world_size, -1).unbind())


def _is_staged(process_group: dist.ProcessGroup, tensor: torch.Tensor) -> bool:
    return tensor.is_cuda and backend_of(process_group, tensor.device) == "gloo"
