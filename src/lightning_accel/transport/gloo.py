"""What gloo needs: messages sent so that both directions are busy, staging of CUDA tensors, and a way to end waits."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from datetime import timedelta

import torch
import torch.distributed as dist

from lightning_accel.transport.scratch import Scratch

Wait = Callable[[], None]
"""Waits for a message that was started; raises if it failed."""

_CPU = torch.device("cpu")

_MAX_INTERFACES = 4
"""Network interfaces that gloo is expected to use at most."""


def backend_of(process_group: dist.ProcessGroup, device: torch.device) -> str:
    """Returns the name of the backend that carries tensors of `device`, such as "gloo" or "nccl"."""
    config = dist.get_backend_config(process_group)
    backends = dict(item.split(":") for item in config.split(",")) if ":" in config else {}
    return str(backends.get(device.type, config))


def is_staged(process_group: dist.ProcessGroup, tensor: torch.Tensor) -> bool:
    """Returns whether messages of a tensor pass through pinned host memory: CUDA tensors that gloo carries."""
    return tensor.is_cuda and backend_of(process_group, tensor.device) == "gloo"


def stage(received: torch.Tensor, sent: torch.Tensor, scratch: Scratch) -> tuple[torch.Tensor, torch.Tensor, Wait]:
    """Returns both messages in host memory, and what copies the received one back; CPU tensors stay where they are."""
    if not sent.is_cuda:
        return received, sent, lambda: None
    on_host = scratch.pinned("received", received.numel())

    def copy_back() -> None:
        received.copy_(on_host)

    return on_host, scratch.pinned("sent", sent.numel()).copy_(sent), copy_back


def send_to_all(
    process_group: dist.ProcessGroup, received: Sequence[torch.Tensor], sent: Sequence[torch.Tensor], rank: int
) -> Wait:
    """Starts to send `sent[k]` to rank k and to receive `received[k]` from it, all at once and both ways at once. Collective.

    Receives are posted first: gloo tells a sender that it may send on the connection that carries the data, and with
    its own all_to_all and all_gather a late rank's word queues behind its own message, which doubles the time.
    """
    n = len(sent)
    works = [dist.irecv(received[k], group=process_group, group_src=k) for k in range(n) if k != rank]
    # Each rank begins with its next neighbour, so that no rank is everybody's first target.
    works += [dist.isend(sent[(rank + k) % n], group=process_group, group_dst=(rank + k) % n) for k in range(1, n)]
    if received[rank].data_ptr() != sent[rank].data_ptr():
        received[rank].copy_(sent[rank])

    def wait() -> None:
        for work in works:
            assert work is not None
            work.wait()

    return wait


def abort(process_group: dist.ProcessGroup, rank: int, world_size: int) -> None:
    """Closes connections: what waits for one of them fails now, on this rank and on others. Not collective.

    gloo has no such call, but a receive that runs out of time closes all connections of its context.
    """
    if backend_of(process_group, _CPU) != "gloo":
        return
    # torch deals tags to contexts in turn, one for each network interface; tag 0 is that of messages.
    for tag in range(1, 1 + _MAX_INTERFACES):
        for k in range(1, world_size):
            peer = (rank + k) % world_size
            try:
                work = dist.irecv(torch.empty(1, dtype=torch.uint8, device=_CPU), group=process_group, group_src=peer, tag=tag)
            except RuntimeError:
                continue  # this connection is closed already, others may not be
            with contextlib.suppress(RuntimeError):
                assert work is not None
                work.wait(timedelta(milliseconds=1))
