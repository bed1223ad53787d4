"""Synchronous procedures on explicit tensors, a group and scratch memory.

They know no bucket, no DDP and no thread: on the CPU they return when the result is there, on CUDA they enqueue on the current
stream. Every function here is collective: all ranks of the group call it, in the same order, with plans made from the same
layout.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from lightning_accel import codecs
from lightning_accel.layout import Layout

# torch 2.13 renamed the functions that gather into one tensor; the old names warn there.
_all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor

_CPU = torch.device("cpu")

_MAX_INTERFACES = 4
"""Network interfaces that gloo is expected to use at most."""


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

    def all_to_all(self, received: torch.Tensor, sent: torch.Tensor, scratch: Scratch) -> None:
        """Part k of `sent` goes to rank k; part k of `received` comes from rank k. Equal parts, uint8."""
        self.sent_bytes += sent.numel() // self.world_size * (self.world_size - 1)
        process_group = self.process_group  # read once: a failure takes it away at any moment, and to torch None is the world
        if process_group is None:
            self._copy_alone(received, sent)
        elif _is_staged(process_group, sent):
            host_sent, host_received = scratch.pinned("sent", sent.numel()), scratch.pinned("received", received.numel())
            host_sent.copy_(sent)
            self._exchange(process_group, _parts(host_received, self), _parts(host_sent, self))
            received.copy_(host_received)
        elif sent.is_cuda:
            dist.all_to_all_single(received, sent, group=process_group)
        else:
            self._exchange(process_group, _parts(received, self), _parts(sent, self))

    def all_gather(self, gathered: torch.Tensor, sent: torch.Tensor, scratch: Scratch) -> None:
        """`gathered` becomes every rank's `sent`, in rank order, uint8."""
        self.sent_bytes += sent.numel() * (self.world_size - 1)
        process_group = self.process_group
        if process_group is None:
            self._copy_alone(gathered, sent)
        elif _is_staged(process_group, sent):
            host_sent, host_gathered = scratch.pinned("sent", sent.numel()), scratch.pinned("received", gathered.numel())
            host_sent.copy_(sent)
            self._exchange(process_group, _parts(host_gathered, self), [host_sent] * self.world_size)
            gathered.copy_(host_gathered)
        elif sent.is_cuda:
            _all_gather_single(gathered, sent, group=process_group)
        else:
            self._exchange(process_group, _parts(gathered, self), [sent] * self.world_size)

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

    def _exchange(self, process_group: dist.ProcessGroup, received: Sequence[torch.Tensor], sent: Sequence[torch.Tensor]) -> None:
        """Sends `sent[k]` to rank k and receives `received[k]` from it, all at once and both ways at once.

        Receives are posted first: gloo tells a sender that it may send on the connection that carries the data, and with
        its own all_to_all and all_gather a late rank's word queues behind its own message, which doubles the time.
        """
        if not received[0].numel():
            return
        n, rank = self.world_size, self.rank
        works = [dist.irecv(received[k], group=process_group, group_src=k) for k in range(n) if k != rank]
        # Each rank begins with its next neighbour, so that no rank is everybody's first target.
        works += [dist.isend(sent[(rank + k) % n], group=process_group, group_dst=(rank + k) % n) for k in range(1, n)]
        received[rank].copy_(sent[rank])
        for work in works:
            assert work is not None
            work.wait()

    def _copy_alone(self, received: torch.Tensor, sent: torch.Tensor) -> None:
        if self.world_size > 1:
            raise RuntimeError("the group was closed")
        received.copy_(sent)


def _parts(message: torch.Tensor, group: Group) -> list[torch.Tensor]:
    """One equal part for each rank."""
    return list(message.view(group.world_size, -1).unbind())


def _is_staged(process_group: dist.ProcessGroup, tensor: torch.Tensor) -> bool:
    return tensor.is_cuda and backend_of(process_group, tensor.device) == "gloo"


class Scratch:
    """Memory that procedures share and keep: it grows to the largest bucket and is kept until `clear`.

    One procedure at a time may use it: the communicator's thread or stream sees to that.
    """

    def __init__(self) -> None:
        self._memory: dict[tuple[str, torch.device], torch.Tensor] = {}

    def bytes(self, name: str, numel: int, device: torch.device) -> torch.Tensor:
        """`numel` bytes called `name`, with whatever they held."""
        return self._get(name, numel, device, pinned=False)

    def pinned(self, name: str, numel: int) -> torch.Tensor:
        """`numel` bytes of pinned host memory."""
        return self._get(f"pinned {name}", numel, torch.device("cpu"), pinned=True)

    def values(self, name: str, numel: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """`numel` elements of `dtype`, with whatever they held."""
        return self.bytes(name, numel * dtype.itemsize, device).view(dtype)

    def clear(self) -> None:
        """Gives everything back; the next use allocates anew."""
        self._memory.clear()

    @property
    def allocated_bytes(self) -> int:
        """Bytes held."""
        return sum(memory.numel() for memory in self._memory.values())

    def _get(self, name: str, numel: int, device: torch.device, *, pinned: bool) -> torch.Tensor:
        memory = self._memory.get((name, device))
        if memory is None or memory.numel() < numel:
            memory = torch.empty(numel, dtype=torch.uint8, device=device, pin_memory=pinned)
            self._memory[name, device] = memory
        return memory[:numel]


@dataclass(frozen=True)
class Piece:
    """A run of a parameter's blocks, and where it lies in a tensor: what a message is made of.

    Attributes:
        owner: rank that sums it.
        tensor_offset: its first element in the tensor.
        numel: elements.
    """

    owner: int
    tensor_offset: int
    numel: int


def pieces_of(layout: Layout, places: Sequence[tuple[int, int]]) -> list[Piece]:
    """Pieces of a tensor that holds parameters: pairs of a place in the layout and the first element in the tensor."""
    return [Piece(run.owner, offset + run.start, run.numel) for parameter, offset in places for run in layout.runs(parameter)]


@dataclass(frozen=True)
class TwoShotPlan:
    """Messages of one tensor in a compressed all_reduce, for one rank.

    All messages have `stride_bytes`, that of the largest: the deal is even, so padding is small, and collectives with equal
    parts are what every backend does best.

    Attributes:
        everything: all pieces of the tensor; rank k's lie from k * stride_bytes on.
        own: this rank's pieces, as one message from 0 on.
        stride_bytes: bytes of a message.
    """

    everything: codecs.Plan
    own: codecs.Plan
    stride_bytes: int

    @classmethod
    def build(cls, codec: str, dtype: torch.dtype, pieces: Sequence[Piece], world_size: int, rank: int) -> TwoShotPlan:
        """Plans messages from pieces; each rank's pieces stand in its message in the order given."""
        by_owner = [[piece for piece in pieces if piece.owner == owner] for owner in range(world_size)]
        messages = [codecs.Plan(codec, dtype, [p.tensor_offset for p in part], [p.numel for p in part]) for part in by_owner]
        stride_bytes = max(message.wire_bytes for message in messages)
        everything = codecs.Plan(
            codec,
            dtype,
            [piece.tensor_offset for part in by_owner for piece in part],
            [piece.numel for part in by_owner for piece in part],
            [k * stride_bytes + offset for k, message in enumerate(messages) for offset in message.wire_offsets],
        )
        return cls(everything, messages[rank], stride_bytes)


def compressed_all_reduce(tensor: torch.Tensor, plan: TwoShotPlan, group: Group, scratch: Scratch, *, divisor: float) -> None:
    """Replaces `tensor` by its sum over the group divided by `divisor`, quantising each element exactly twice. Collective.

    1. Encode every rank's blocks into its message.
    2. all_to_all: rank k receives all ranks' codes of the blocks it owns.
    3. Decode them, sum in rank order 0..n-1 in float32, divide, encode: the second and last quantisation.
    4. all_gather: every rank receives the codes of all means.
    5. Decode them, the own ones too, so that all ranks end bit-identical.

    Bytes sent by each rank: 2 (n-1) messages of about 1/n of the tensor's code; messages: 2. `compressed_reduce_scatter` is
    steps 1 to 3, `compressed_all_gather` 4 and 5; run in two lanes, one tensor's second half overlaps the next one's first.

    Args:
        tensor: one-dimensional, of the plan's dtype; overwritten. Elements outside the plan keep their value.
        plan: the same layout on all ranks.
        group: the ranks.
        scratch: reused; nothing is allocated once it has grown.
        divisor: the number of ranks for a mean, 1 for a sum.
    """
    mean = scratch.bytes("mean", plan.stride_bytes, tensor.device)
    compressed_reduce_scatter(tensor, plan, mean, group, scratch, divisor=divisor)
    compressed_all_gather(mean, plan, tensor, group, scratch)


def compressed_reduce_scatter(
    tensor: torch.Tensor, plan: TwoShotPlan, mean: torch.Tensor, group: Group, scratch: Scratch, *, divisor: float
) -> None:
    """Steps 1 to 3 of `compressed_all_reduce`: `mean` becomes the code of this rank's blocks' mean. Collective.

    Args:
        tensor: read only.
        plan: the same layout on all ranks.
        mean: `plan.stride_bytes` bytes, overwritten.
        group: the ranks.
        scratch: reused.
        divisor: the number of ranks for a mean, 1 for a sum.
    """
    n, stride_bytes = group.world_size, plan.stride_bytes
    sent = scratch.bytes("sent", n * stride_bytes, tensor.device)
    received = scratch.bytes("received", n * stride_bytes, tensor.device)
    codecs.encode(plan.everything, tensor, sent)  # (1)
    group.all_to_all(received, sent, scratch)  # (2)
    codecs.decode_sum_encode(plan.own, received, mean, count=n, stride_bytes=stride_bytes, divisor=divisor)  # (3)


def compressed_all_gather(mean: torch.Tensor, plan: TwoShotPlan, tensor: torch.Tensor, group: Group, scratch: Scratch) -> None:
    """Steps 4 and 5 of `compressed_all_reduce`: `tensor` becomes the means of all ranks' blocks. Collective.

    Args:
        mean: what `compressed_reduce_scatter` left; read only.
        plan: the same layout on all ranks.
        tensor: overwritten.
        group: the ranks.
        scratch: reused.
    """
    gathered = scratch.bytes("gathered", group.world_size * plan.stride_bytes, tensor.device)
    group.all_gather(gathered, mean, scratch)  # (4)
    codecs.decode(plan.everything, gathered, tensor)  # (5)


@dataclass(frozen=True)
class HierarchicalPlan:
    """Messages of one tensor in a hierarchical all_reduce, for one rank.

    Attributes:
        inside: the tensor among the ranks of a node, uncompressed.
        share: this rank's message of `inside` as a dense tensor.
        share_numel: elements of that.
        between: the dense tensor among the ranks of equal local rank.
    """

    inside: TwoShotPlan
    share: codecs.Plan
    share_numel: int
    between: TwoShotPlan

    @classmethod
    def build(
        cls,
        codec: str,
        dtype: torch.dtype,
        layout: Layout,
        places: Sequence[tuple[int, int]],
        node: Group,
        peers: Group,
    ) -> HierarchicalPlan:
        """Plans a tensor that holds parameters: pairs of a place in the layout and the first element in the tensor."""
        inner_pieces = []
        numels = []
        starts = []
        share_numel = 0
        for parameter, _ in places:
            for run in layout.runs(parameter):
                if run.owner == node.rank:
                    inner_pieces += [
                        Piece(inner.owner, share_numel + inner.start, inner.numel) for inner in layout.inner_runs(parameter, run)
                    ]
                    starts.append(share_numel)
                    numels.append(run.numel)
                    share_numel += run.numel
        value_dtype = torch.float64 if dtype == torch.float64 else torch.float32
        # Nothing is quantised where nothing leaves the node.
        between_codec = codec if peers.world_size > 1 else "none"
        return cls(
            inside=TwoShotPlan.build("none", dtype, pieces_of(layout, places), node.world_size, node.rank),
            share=codecs.Plan("none", dtype, starts, numels),
            share_numel=share_numel,
            between=TwoShotPlan.build(between_codec, value_dtype, inner_pieces, peers.world_size, peers.rank),
        )


def hierarchical_reduce_scatter(
    tensor: torch.Tensor,
    plan: HierarchicalPlan,
    mean: torch.Tensor,
    node: Group,
    peers: Group,
    scratch: Scratch,
    *,
    divisor: float,
) -> None:
    """First half of a hierarchical all_reduce; only what leaves a node is compressed. Collective.

    1. all_to_all inside the node, uncompressed: every rank receives the node's values of its share.
    2. Sum the share in order of local ranks, in float32 (float64 for float64).
    3. compressed_reduce_scatter of the share among the ranks of equal local rank, one a node.

    Args:
        tensor: one-dimensional, of the plan's dtype; read only.
        plan: from the same layout on all ranks.
        mean: `plan.between.stride_bytes` bytes, overwritten.
        node: ranks of this node.
        peers: ranks of equal local rank, in the order of nodes.
        scratch: reused.
        divisor: the number of all ranks for a mean, 1 for a sum.
    """
    device, stride_bytes = tensor.device, plan.inside.stride_bytes
    sent = scratch.bytes("node sent", node.world_size * stride_bytes, device)
    received = scratch.bytes("node received", node.world_size * stride_bytes, device)
    share = scratch.values("share", plan.share_numel, plan.share.value_dtype, device)
    codecs.encode(plan.inside.everything, tensor, sent)
    node.all_to_all(received, sent, scratch)  # (1)
    share.zero_()
    for k in range(node.world_size):
        codecs.decode_accumulate(plan.share, received[k * stride_bytes :], share)  # (2)
    compressed_reduce_scatter(share, plan.between, mean, peers, scratch, divisor=divisor)  # (3)


def hierarchical_all_gather(
    mean: torch.Tensor, plan: HierarchicalPlan, tensor: torch.Tensor, node: Group, peers: Group, scratch: Scratch
) -> None:
    """Second half: `tensor` becomes the mean over all ranks. Collective.

    4. compressed_all_gather of the share among the ranks of equal local rank.
    5. all_gather inside the node, in the tensor's dtype.

    Args:
        mean: what `hierarchical_reduce_scatter` left; read only.
        plan: from the same layout on all ranks.
        tensor: overwritten.
        node: ranks of this node.
        peers: ranks of equal local rank, in the order of nodes.
        scratch: reused.
    """
    device, inside = tensor.device, plan.inside
    share = scratch.values("share", plan.share_numel, plan.share.value_dtype, device)
    compressed_all_gather(mean, plan.between, share, peers, scratch)  # (4)
    rounded = scratch.values("rounded share", plan.share_numel, tensor.dtype, device)
    rounded.copy_(share)
    message = scratch.bytes("node message", inside.stride_bytes, device)
    codecs.encode(plan.share, rounded, message)
    compressed_all_gather(message, inside, tensor, node, scratch)  # (5)
