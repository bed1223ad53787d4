"""A two-shot all_reduce as one kernel, over memory that the ranks of a node map into each other's address space.

It is `compressed_all_reduce` without messages: ranks write codes where the others read them, over NVLink or PCIe, and tell one
another by flags in that memory how far they are (native/include/lightning_accel/peer_all_reduce.h has the steps). The bits are
the same.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist

from lightning_accel.collectives.message_plan import TwoShotPlan
from lightning_accel.compression.error_feedback import Feedback, residual_addresses
from lightning_accel.compression.operations import check_operands
from lightning_accel.logs import get_log
from lightning_accel.native import kernels
from lightning_accel.transport.group import Group

if TYPE_CHECKING:
    from torch._C._distributed_c10d import _SymmetricMemory

_T = TypeVar("_T")

_log = get_log(__name__)

CODECS = ("int8", "none")
"""Codecs that the kernel is made for."""


class PeerMemory:
    """Memory of every rank in a group that all of them read. Made by `open_peer_memory`.

    One all_reduce at a time uses it: they run in one order, in one stream.

    Args:
        group: Ranks on one node, at most `kernels.MOST_PEERS`.
        memory: This rank's memory, uint8, all flags down.
        mapping: torch's handle, which keeps the others' memory mapped.
        timeout: Longest wait for the others in an all_reduce.
    """

    def __init__(self, group: Group, memory: torch.Tensor, mapping: _SymmetricMemory, timeout: timedelta) -> None:
        self._group = group
        self._memory = memory
        self._mapping: _SymmetricMemory | None = mapping
        self._addresses = list(mapping.buffer_ptrs)
        self._timeout = timeout
        # Kernels write here and the host looks without waiting for the GPU, or the other way round.
        self._failure = torch.zeros(1, dtype=torch.int32, device="cpu", pin_memory=memory.is_cuda)

    def all_reduce(self, tensor: torch.Tensor, plan: TwoShotPlan, *, divisor: float, feedback: Feedback | None = None) -> None:
        """Does what `compressed_all_reduce` does, enqueued on the current stream of the tensor's device. Collective.

        If a rank does not come in time, what was not summed becomes NaN, then and ever after, and `check` raises.

        Raises:
            TimeoutError: If an earlier all_reduce has failed by now.
            ValueError: For a tensor or residuals of another kind than planned.
        """
        self.check()
        device = self._memory.device
        check_operands(tensor, plan.everything.dtype, self._memory, "tensor")
        worker, server = (feedback.worker, feedback.server) if feedback is not None else (None, None)
        residuals = residual_addresses(worker, device), residual_addresses(server, device)
        with torch.cuda.device(device):
            kernels.peer_all_reduce(
                plan.everything.native,
                plan.own.native,
                plan.stride_bytes,
                plan.is_whole,
                plan.everything.segments_on(device),
                plan.own.segments_on(device),
                tensor.data_ptr(),
                tensor.numel(),
                self._addresses,
                self._memory.numel(),
                self._group.rank,
                divisor,
                *residuals,
                self._failure.data_ptr(),
                self._timeout.total_seconds(),
                torch.cuda.current_stream(device).cuda_stream,
            )
        # What the others have read of this rank's memory.
        self._group.sent_bytes += (1 if plan.is_whole else 2) * (self._group.world_size - 1) * plan.stride_bytes

    def check(self) -> None:
        """Raises TimeoutError if a rank did not come to an all_reduce; does not wait for the GPU."""
        if missing := int(self._failure[0]):
            who = f"rank {missing - 1} of {self._group.world_size}" if missing > 0 else "this rank"
            raise TimeoutError(f"{who} did not come to an all_reduce within {self._timeout.total_seconds():.0f} s, or was ended")

    def abort(self) -> None:
        """Ends this rank's waits; on a GPU within moments."""
        if not self._failure[0]:
            self._failure[0] = -1

    def close(self) -> None:
        """Gives the memory back, after what is under way. Not collective; nothing may come after it."""
        if self._mapping is not None and self._memory.is_cuda:
            torch.cuda.synchronize(self._memory.device)
        self._mapping = None
        self._memory = self._memory[:0].clone()


def open_peer_memory(
    group: Group, plans: Iterable[TwoShotPlan], device: torch.device, timeout: timedelta, *, is_one_node: bool
) -> PeerMemory | None:
    """Makes memory for the largest of some all_reduces, or says once why there can be none. Collective.

    Args:
        group: The ranks.
        plans: Plans of the largest tensors, of one codec.
        device: Device of the tensors.
        timeout: Longest wait for the others in an all_reduce.
        is_one_node: Whether all ranks are on one node.
    """
    plans = list(plans)
    num_bytes = max(kernels.peer_memory_bytes(1 if p.is_whole else group.world_size, p.stride_bytes) for p in plans)
    process_group = group.process_group
    assert process_group is not None
    devices: list[int | None] = [None] * group.world_size
    memory = mapping = None
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        dist.all_gather_object(devices, device.index, group=process_group)
        reason = _agree(_obstacle(group, plans[0].everything.codec, device, devices, is_one_node=is_one_node), process_group)
        # One step after the other: all ranks must come to torch's rendezvous, or none.
        if reason is None:
            memory, reason = _try(_allocate, num_bytes, device)
            reason = _agree(reason, process_group)
        if reason is None:
            mapping, reason = _try(_map, memory, process_group)
            reason = _agree(reason, process_group)
    if reason is None:
        assert memory is not None
        assert mapping is not None
        return PeerMemory(group, memory, mapping, timeout)
    if group.rank == 0:
        _log.warning("no memory is shared between GPUs, so codes travel as messages: %s", reason)
    return None


def _obstacle(group: Group, codec: str, device: torch.device, devices: list[int | None], *, is_one_node: bool) -> str | None:
    if device.type != "cuda" or not kernels.CUDA_ARCHITECTURES:
        return "the tensors are not on a GPU, or this build has no CUDA kernels"
    if not is_one_node:
        return "ranks are on several nodes"
    if group.world_size > kernels.MOST_PEERS:
        return f"there are {group.world_size} ranks, more than {kernels.MOST_PEERS}"
    if codec not in CODECS:
        return f"the codec is {codec}, not {' or '.join(CODECS)}"
    for rank, other in enumerate(devices):
        if other in (None, device.index):
            continue
        if other >= torch.cuda.device_count() or not torch.cuda.can_device_access_peer(device, other):
            return f"rank {group.rank}'s GPU cannot read rank {rank}'s memory"
    return None


def _allocate(num_bytes: int, device: torch.device) -> torch.Tensor:
    """Returns memory that can be mapped, with all flags down."""
    from torch._C._distributed_c10d import _SymmetricMemory

    # An allocation of its own: torch's `empty` for shared memory may take a part of another one.
    memory: torch.Tensor = _SymmetricMemory.empty_strided_p2p((num_bytes,), (1,), torch.uint8, device)
    memory[: kernels.PEER_MESSAGES_OFFSET].zero_()
    torch.cuda.synchronize(device)
    return memory


def _map(memory: torch.Tensor, process_group: dist.ProcessGroup) -> _SymmetricMemory:
    """Maps every rank's memory into this process. Collective."""
    from torch.distributed._symmetric_memory import rendezvous  # registers operators, so only where it is needed

    return rendezvous(memory, process_group.group_name)


def _try(function: Callable[..., _T], *arguments: Any) -> tuple[_T | None, str | None]:
    """Returns what a function gives, or why torch cannot: no memory, one GPU under several numbers, an old driver ..."""
    try:
        return function(*arguments), None
    except (ImportError, RuntimeError) as error:
        return None, str(error).splitlines()[0]


def _agree(reason: str | None, process_group: dist.ProcessGroup) -> str | None:
    """Returns the reason of the first rank that has one. Collective; when it returns all ranks have come to it."""
    reasons: list[str | None] = [None] * dist.get_world_size(process_group)
    dist.all_gather_object(reasons, reason, group=process_group)
    return next((one for one in reasons if one is not None), None)
