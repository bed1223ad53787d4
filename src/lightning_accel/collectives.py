"""Synchronous procedures on explicit tensors, a group and scratch memory.

They know no bucket, no DDP and no thread: on the CPU they return when the result is there, on CUDA they enqueue on the current
stream. Every function here is collective: all ranks of the group call it, in the same order, with plans made from the same
layout.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from lightning_accel import codecs
from lightning_accel.layout import Layout, Run

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


class Scratch:
    """Memory that procedures keep: it grows to what was asked for and stays until `clear`.

    One procedure at a time may use it, on a GPU one stream; what is started is not over.
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

    def clear(self, streams: Iterable[torch.cuda.Stream] = ()) -> None:
        """Gives everything back; the next use allocates anew. On a GPU, what runs in `streams` may end before."""
        for memory in self._memory.values():
            for stream in streams if memory.is_cuda else ():
                memory.record_stream(stream)
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
        tensor_offset: its first element in the tensor.
        run: what it is; its owner sums it.
    """

    tensor_offset: int
    run: Run


def pieces_of(layout: Layout, places: Sequence[tuple[int, int]]) -> list[Piece]:
    """Pieces of a tensor that holds parameters: pairs of a place in the layout and the first element in the tensor."""
    return [Piece(offset + run.start, run) for parameter, offset in places for run in layout.runs(parameter)]


@dataclass(frozen=True)
class Feedback:
    """Residuals of a two-shot all_reduce.

    Attributes:
        worker: of what this rank sends, by `Run.place`.
        server: of the sums that this rank makes, by `Run.owned_place`, or `Run.place` where each rank sums all.
    """

    worker: codecs.Residuals
    server: codecs.Residuals


@dataclass(frozen=True)
class TwoShotPlan:
    """Messages of one tensor in a compressed all_reduce, for one rank.

    All messages have `stride_bytes`, that of the largest: the deal is even, so padding is small, and collectives with equal
    parts are what every backend does best.

    Attributes:
        everything: all pieces of the tensor; rank k's lie from k * stride_bytes on, or all in one message if `is_whole`.
        own: the pieces this rank sums, as one message from 0 on.
        stride_bytes: bytes of a message.
        is_whole: whether every rank sums all pieces.
    """

    everything: codecs.Plan
    own: codecs.Plan
    stride_bytes: int
    is_whole: bool

    @classmethod
    def build(
        cls, codec: str, dtype: torch.dtype, pieces: Sequence[Piece], world_size: int, rank: int, *, scatter: bool = False
    ) -> TwoShotPlan:
        """Plans messages from pieces; each rank's pieces stand in its message in the order given.

        Up to two ranks, each sums all pieces, unless `scatter` asks for shares.
        """
        if world_size <= 2 and not scatter:
            whole = _plan(codec, dtype, pieces, [piece.run.place for piece in pieces])
            return cls(whole, whole, whole.wire_bytes, is_whole=True)
        by_owner = [[piece for piece in pieces if piece.run.owner == owner] for owner in range(world_size)]
        messages = [_plan(codec, dtype, part, [piece.run.owned_place for piece in part]) for part in by_owner]
        stride_bytes = max(message.wire_bytes for message in messages)
        in_order = [piece for part in by_owner for piece in part]
        wire_offsets = [k * stride_bytes + offset for k, message in enumerate(messages) for offset in message.wire_offsets]
        everything = _plan(codec, dtype, in_order, [piece.run.place for piece in in_order], wire_offsets)
        return cls(everything, messages[rank], stride_bytes, is_whole=False)


def _plan(
    codec: str, dtype: torch.dtype, pieces: Sequence[Piece], residual_offsets: list[int], wire_offsets: list[int] | None = None
) -> codecs.Plan:
    tensor_offsets = [piece.tensor_offset for piece in pieces]
    return codecs.Plan(codec, dtype, tensor_offsets, [piece.run.numel for piece in pieces], wire_offsets, residual_offsets)


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
        codecs.decode_sum_encode(plan.own, received, mean, count=n, stride_bytes=stride_bytes, divisor=divisor, residuals=server)

    if plan.is_whole:
        own = received[rank * stride_bytes :][:stride_bytes]

        def encode_whole() -> None:
            codecs.encode(plan.everything, tensor, own, worker)  # (1)
            waits.append(first.all_gather(received, own, scratch))  # (2)

        def sum_whole() -> None:
            waits.pop()()
            sum_up(own)  # (3)
            codecs.decode(plan.everything, own, tensor)  # (5)

        return [encode_whole, sum_whole]

    sent = scratch.bytes("sent", n * stride_bytes, tensor.device)

    def encode() -> None:
        codecs.encode(plan.everything, tensor, sent, worker)  # (1)
        waits.append(first.all_to_all(received, sent, scratch))  # (2)

    def sum_own() -> None:
        waits.pop()()
        mean = sent[rank * stride_bytes :][:stride_bytes]  # all has been sent from there
        sum_up(mean)  # (3)
        waits.append(second.all_gather(sent, mean, scratch))  # (4)

    def decode() -> None:
        waits.pop()()
        codecs.decode(plan.everything, sent, tensor)  # (5)

    return [encode, sum_own, decode]


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
        share: Layout,
        places: Sequence[tuple[int, int]],
        node: Group,
        peers: Group,
    ) -> HierarchicalPlan:
        """Plans a tensor that holds parameters: pairs of a place in the layout and the first element in the tensor.

        `share` is this rank's share of the layout.
        """
        starts = []
        share_places = []
        share_numel = 0
        for parameter, _ in places:
            starts.append(share_numel)
            share_places.append((parameter, share_numel))
            share_numel += share.numels[parameter]
        value_dtype = torch.float64 if dtype == torch.float64 else torch.float32
        # Nothing is quantised where nothing leaves the node.
        between_codec = codec if peers.world_size > 1 else "none"
        return cls(
            inside=TwoShotPlan.build("none", dtype, pieces_of(layout, places), node.world_size, node.rank, scatter=True),
            share=codecs.Plan("none", dtype, starts, [share.numels[parameter] for parameter, _ in places]),
            share_numel=share_numel,
            between=TwoShotPlan.build(between_codec, value_dtype, pieces_of(share, share_places), peers.world_size, peers.rank),
        )


def hierarchical_all_reduce(
    tensor: torch.Tensor,
    plan: HierarchicalPlan,
    node: Group,
    peers: Group,
    scratch: Scratch,
    *,
    divisor: float,
    feedback: Feedback | None = None,
) -> None:
    """Replaces `tensor` by its sum over all ranks divided by `divisor`; only what leaves a node is compressed. Collective.

    1. all_to_all inside the node, uncompressed: every rank receives the node's values of its share.
    2. Sum the share in order of local ranks, in float32 (float64 for float64).
    3. compressed_all_reduce of the share among the ranks of equal local rank, one a node.
    4. all_gather inside the node, in the tensor's dtype.

    Args:
        tensor: one-dimensional, of the plan's dtype; overwritten.
        plan: from the same layout on all ranks.
        node: ranks of this node.
        peers: ranks of equal local rank, in the order of nodes.
        scratch: reused.
        divisor: the number of all ranks for a mean, 1 for a sum.
        feedback: what codes between nodes have lost, on this rank; None for no error feedback.
    """
    scratches = Scratch(), scratch, scratch
    for step in hierarchical_all_reduce_steps(tensor, plan, node, peers, node, *scratches, divisor=divisor, feedback=feedback):
        step()


def hierarchical_all_reduce_steps(
    tensor: torch.Tensor,
    plan: HierarchicalPlan,
    node: Group,
    peers: Group,
    second_node: Group,
    kept: Scratch,
    first: Scratch,
    second: Scratch,
    *,
    divisor: float,
    feedback: Feedback | None = None,
) -> list[Callable[[], None]]:
    """`hierarchical_all_reduce` cut in two, so that gathering one tensor overlaps the next one's sums.

    Args:
        tensor: overwritten by the second one.
        plan: from the same layout on all ranks.
        node: ranks of this node; carries the messages of step 1.
        peers: ranks of equal local rank, in the order of nodes.
        second_node: the ranks of `node`; carries the messages of step 4.
        kept: of this tensor: its share and the share's code.
        first: for the first step alone, of several tensors in turn.
        second: for the second.
        divisor: the number of all ranks for a mean, 1 for a sum.
        feedback: what codes between nodes have lost, on this rank; None for no error feedback.
    """
    device, inside, stride_bytes = tensor.device, plan.inside, plan.inside.stride_bytes
    share = kept.values("share", plan.share_numel, plan.share.value_dtype, device)
    steps = compressed_all_reduce_steps(share, plan.between, peers, peers, kept, divisor=divisor, feedback=feedback)
    *before, last = steps

    def sum_up() -> None:
        sent = first.bytes("node sent", node.world_size * stride_bytes, device)
        received = first.bytes("node received", node.world_size * stride_bytes, device)
        codecs.encode(inside.everything, tensor, sent)
        node.all_to_all(received, sent, first)()  # (1)
        share.zero_()
        for k in range(node.world_size):
            codecs.decode_accumulate(plan.share, received[k * stride_bytes :], share)  # (2)
        for step in before:  # (3)
            step()

    def gather() -> None:
        last()
        rounded = second.values("rounded share", plan.share_numel, tensor.dtype, device)
        rounded.copy_(share)
        gathered = second.bytes("node gathered", second_node.world_size * stride_bytes, device)
        message = gathered[second_node.rank * stride_bytes :][:stride_bytes]
        codecs.encode(plan.share, rounded, message)
        second_node.all_gather(gathered, message, second)()  # (4)
        codecs.decode(inside.everything, gathered, tensor)

    return [sum_up, gather]
