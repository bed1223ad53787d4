"""Bagua's communication functions over torch.distributed: synchronous, on the CPU and on GPUs.

All except `send` and `recv` are collective: all ranks of `comm` call them in the same order. `comm` is a torch process group,
None is the default one; `src` and `dst` are ranks in it. Tensors are contiguous; the parts of a tensor are equal and in rank
order.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import ReduceOp as ReduceOp
from torch._C._distributed_c10d import Store
from torch.distributed import ProcessGroup

from lightning_accel.environment import variable
from lightning_accel.launch import process_group
from lightning_accel.logs import get_log

_log = get_log(__name__)

_TUNING = ("BAGUA_AUTOTUNE", "BAGUA_DEFAULT_BUCKET_SIZE", "BAGUA_SERVICE_PORT", "BAGUA_NET_IMPLEMENT")


def init_process_group(store: Store | None = None, rank: int = -1, world_size: int = -1, local_world_size: int = -1) -> None:
    """Makes torch.distributed's default group, unless there is one. Collective.

    The backend is nccl where there is a CUDA device, else gloo. There is no tuning service, and nothing listens.

    Args:
        store: Store in which ranks meet; None reads the launcher's variables (see `lightning_accel.init_process_group`).
        rank: Rank of this process; needed with a store, like the next two.
        world_size: Number of processes.
        local_world_size: Number of processes on this node, equal on all; the local rank is `rank % local_world_size`.

    Raises:
        ValueError: If a store is given without the others, or variables are missing.
    """
    ignored = [name for name in _TUNING if variable(name) not in (None, "0", "-1")]
    if ignored and (rank if store is not None else process_group.get_rank()) == 0:
        _log.warning("%s: set, but there is no tuning service and no Bagua-Net here; see docs/migrate.md", ", ".join(ignored))
    if dist.is_initialized():
        return
    if store is None:
        process_group.init_process_group()
        return
    if min(rank, world_size, local_world_size) < 0:
        raise ValueError(f"a store needs rank, world_size and local_world_size: got {rank}, {world_size} and {local_world_size}")
    local_rank = rank % local_world_size
    process_group.init_process_group(
        rank=rank, world_size=world_size, local_rank=local_rank, local_world_size=local_world_size, store=store
    )


def is_initialized() -> bool:
    """Tells whether there is a default group."""
    return dist.is_initialized()


def new_group(ranks: list[int] | None = None, stream: object = None) -> ProcessGroup:
    """Makes a group of some ranks. Collective over all ranks, members or not.

    Args:
        ranks: Ranks of the default group, which are sorted, as Bagua does; None means all.
        stream: Unused argument: each backend has streams of its own.
    """
    group: ProcessGroup = dist.new_group(None if ranks is None else sorted(ranks))
    return group


def from_torch_group(group: ProcessGroup, stream: object = None) -> ProcessGroup:
    """Returns the group itself, because groups are torch's here."""
    return group


def send(tensor: torch.Tensor, dst: int, comm: ProcessGroup | None = None) -> None:
    """Sends a tensor to one rank."""
    dist.send(tensor, group=comm, group_dst=dst)


def recv(tensor: torch.Tensor, src: int, comm: ProcessGroup | None = None) -> None:
    """Overwrites a tensor with what one rank sends."""
    dist.recv(tensor, group=comm, group_src=src)


def broadcast(tensor: torch.Tensor, src: int = 0, comm: ProcessGroup | None = None) -> None:
    """Overwrites a tensor with the one of `src`."""
    dist.broadcast(tensor, group=comm, group_src=src)


def broadcast_coalesced(tensors: Sequence[torch.Tensor], src: int = 0, comm: ProcessGroup | None = None) -> None:
    """Overwrites tensors with the ones of `src`."""
    for tensor in tensors:
        broadcast(tensor, src, comm)


def broadcast_object(obj: object, src: int = 0, comm: ProcessGroup | None = None) -> object:
    """Returns the object of `src`, which is pickled: use it among trusted processes only."""
    objects = [obj]
    dist.broadcast_object_list(objects, group=comm, group_src=src)
    return objects[0]


def reduce(
    send_tensor: torch.Tensor,
    recv_tensor: torch.Tensor,
    dst: int,
    op: ReduceOp.RedOpType = ReduceOp.SUM,
    comm: ProcessGroup | None = None,
) -> None:
    """Overwrites `recv_tensor` on `dst`, and there alone, with the reduction of all ranks' `send_tensor`."""
    reduced = send_tensor.clone()
    dist.reduce(reduced, group=comm, group_dst=dst, op=op)
    if dist.get_rank(comm) == dst:
        recv_tensor.copy_(reduced)


def reduce_inplace(
    tensor: torch.Tensor, dst: int, op: ReduceOp.RedOpType = ReduceOp.SUM, comm: ProcessGroup | None = None
) -> None:
    """Reduces as `reduce` does, into the tensor that is sent."""
    reduce(tensor, tensor, dst, op, comm)


def allreduce(
    send_tensor: torch.Tensor,
    recv_tensor: torch.Tensor,
    op: ReduceOp.RedOpType = ReduceOp.SUM,
    comm: ProcessGroup | None = None,
) -> None:
    """Overwrites `recv_tensor` with the reduction of all ranks' `send_tensor`."""
    recv_tensor.copy_(send_tensor)
    allreduce_inplace(recv_tensor, op, comm)


def allreduce_inplace(tensor: torch.Tensor, op: ReduceOp.RedOpType = ReduceOp.SUM, comm: ProcessGroup | None = None) -> None:
    """Overwrites a tensor with the reduction of all ranks'."""
    dist.all_reduce(tensor, op, comm)


def allreduce_coalesced_inplace(
    tensors: Sequence[torch.Tensor], op: ReduceOp.RedOpType = ReduceOp.SUM, comm: ProcessGroup | None = None
) -> None:
    """Overwrites each tensor with the reduction of all ranks'."""
    for tensor in tensors:
        allreduce_inplace(tensor, op, comm)


def allgather(send_tensor: torch.Tensor, recv_tensor: torch.Tensor, comm: ProcessGroup | None = None) -> None:
    """Overwrites `recv_tensor` with all ranks' `send_tensor`."""
    dist.all_gather(_parts(recv_tensor, comm), send_tensor.view(-1), comm)


def allgather_inplace(tensor: torch.Tensor, comm: ProcessGroup | None = None) -> None:
    """Overwrites each part of a tensor with the one of the rank it belongs to."""
    allgather(_parts(tensor, comm)[dist.get_rank(comm)].clone(), tensor, comm)


def gather(send_tensor: torch.Tensor, recv_tensor: torch.Tensor, dst: int, comm: ProcessGroup | None = None) -> None:
    """Overwrites `recv_tensor` on `dst`, and there alone, with all ranks' `send_tensor`."""
    parts = _parts(recv_tensor, comm) if dist.get_rank(comm) == dst else None
    dist.gather(send_tensor.view(-1), parts, group=comm, group_dst=dst)


def gather_inplace(tensor: torch.Tensor, count: int, dst: int, comm: ProcessGroup | None = None) -> None:
    """Gathers into the tensor of `dst`, which holds a part for each rank; other tensors are one part of `count` elements."""
    rank = dist.get_rank(comm)
    own = _parts(tensor, comm)[rank].clone() if rank == dst else tensor.view(-1)
    _check_count(own, count)
    gather(own, tensor, dst, comm)


def scatter(send_tensor: torch.Tensor, recv_tensor: torch.Tensor, src: int, comm: ProcessGroup | None = None) -> None:
    """Overwrites `recv_tensor` with this rank's part of the `send_tensor` of `src`."""
    parts = _parts(send_tensor, comm) if dist.get_rank(comm) == src else None
    dist.scatter(recv_tensor.view(-1), parts, group=comm, group_src=src)


def scatter_inplace(tensor: torch.Tensor, count: int, src: int, comm: ProcessGroup | None = None) -> None:
    """Scatters the tensor of `src`, which does not change; other tensors are one part of `count` elements."""
    rank = dist.get_rank(comm)
    own = _parts(tensor, comm)[rank].clone() if rank == src else tensor.view(-1)
    _check_count(own, count)
    scatter(tensor, own, src, comm)


def reduce_scatter(
    send_tensor: torch.Tensor,
    recv_tensor: torch.Tensor,
    op: ReduceOp.RedOpType = ReduceOp.SUM,
    comm: ProcessGroup | None = None,
) -> None:
    """Overwrites `recv_tensor` with this rank's part of the reduction of all ranks' `send_tensor`."""
    dist.reduce_scatter(recv_tensor.view(-1), _parts(send_tensor, comm), op, comm)


def reduce_scatter_inplace(tensor: torch.Tensor, op: ReduceOp.RedOpType = ReduceOp.SUM, comm: ProcessGroup | None = None) -> None:
    """Reduces as `reduce_scatter` does, into the first part of the tensor that is sent."""
    first = _parts(tensor, comm)[0]
    received = torch.empty_like(first)
    reduce_scatter(tensor, received, op, comm)
    first.copy_(received)


def alltoall(send_tensor: torch.Tensor, recv_tensor: torch.Tensor, comm: ProcessGroup | None = None) -> None:
    """Sends each rank its part of `send_tensor`, and overwrites `recv_tensor` with the received parts."""
    _parts(send_tensor, comm)
    dist.all_to_all_single(recv_tensor.view(-1), send_tensor.view(-1), group=comm)


def alltoall_inplace(tensor: torch.Tensor, comm: ProcessGroup | None = None) -> None:
    """Exchanges parts as `alltoall` does, into the tensor that is sent."""
    alltoall(tensor.clone(), tensor, comm)


def alltoall_v(
    send_tensor: torch.Tensor,
    send_counts: Sequence[int],
    send_displs: Sequence[int],
    recv_tensor: torch.Tensor,
    recv_counts: Sequence[int],
    recv_displs: Sequence[int],
    comm: ProcessGroup | None = None,
) -> None:
    """Exchanges parts as `alltoall` does; each rank's part has its own count of elements and first element (`displs`)."""
    counts = [int(count) for count in recv_counts]
    sent = torch.cat(_cut(send_tensor, send_counts, send_displs))
    received = recv_tensor.new_empty(sum(counts))
    dist.all_to_all_single(received, sent, counts, [int(count) for count in send_counts], group=comm)
    for place, part in zip(_cut(recv_tensor, recv_counts, recv_displs), torch.split(received, counts), strict=True):
        place.copy_(part)


def alltoall_v_inplace(
    tensor: torch.Tensor, counts: Sequence[int], displs: Sequence[int], comm: ProcessGroup | None = None
) -> None:
    """Exchanges parts as `alltoall_v` does, into the places that are sent: parts to and from a rank have the same size."""
    alltoall_v(tensor, counts, displs, tensor, counts, displs, comm)


def barrier(comm: ProcessGroup | None = None) -> None:
    """Waits until all ranks have called it."""
    dist.barrier(comm)


def _parts(tensor: torch.Tensor, comm: ProcessGroup | None) -> list[torch.Tensor]:
    """Returns a view of each rank's part."""
    ranks = dist.get_world_size(comm)
    if tensor.numel() % ranks:
        raise ValueError(f"the tensor must have a part of equal size for each of {ranks} ranks: got {tensor.numel()} elements")
    return list(tensor.view(ranks, -1).unbind())


def _cut(tensor: torch.Tensor, counts: Sequence[int], displs: Sequence[int]) -> list[torch.Tensor]:
    return [tensor.view(-1)[displ : displ + count] for count, displ in zip(counts, displs, strict=True)]


def _check_count(part: torch.Tensor, count: int) -> None:
    if part.numel() != count:
        raise ValueError(f"each rank's part must have count {count} elements: got {part.numel()}")
