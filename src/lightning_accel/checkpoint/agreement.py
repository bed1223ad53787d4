"""Agreement between ranks: all of them raise, or none does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

_T = TypeVar("_T")


def raise_together(action: Callable[[], _T], what: str, group: dist.ProcessGroup | None = None) -> _T:
    """Runs `action` on this rank, and raises on all ranks if it failed on any, so that none goes on alone. Collective.

    Args:
        action: Function to run; it must not communicate, since it may fail on some ranks only.
        what: Verb and object for the error's message: "rank 1 could not <what>".
        group: Process group of the ranks; None is the default one.

    Returns:
        What `action` returned on this rank.

    Raises:
        FileNotFoundError: If the first rank that failed raised it; ValueError likewise.
        RuntimeError: If the first rank that failed raised anything else.
    """
    error: Exception | None = None
    try:
        result = action()
    except Exception as raised:
        error = raised
    name = type(error).__name__
    own = None if error is None else (name, f"rank {rank_and_world_size(group)[0]} could not {what}: {name}: {error}")
    for failure in all_gather(own, group):
        if failure is not None:
            name, message = failure
            raise {"FileNotFoundError": FileNotFoundError, "ValueError": ValueError}.get(name, RuntimeError)(message) from error
    return result


def rank_and_world_size(group: dist.ProcessGroup | None) -> tuple[int, int]:
    """Returns rank and world size; 0 and 1 where no process group is initialised."""
    return (dist.get_rank(group), dist.get_world_size(group)) if dist.is_initialized() else (0, 1)


def all_gather(value: Any, group: dist.ProcessGroup | None) -> list[Any]:
    """Returns every rank's value, in rank order. Collective."""
    values = [value] * rank_and_world_size(group)[1]
    if len(values) > 1:
        dist.all_gather_object(values, value, group=group)
    return values


def of_first_rank(value: _T, group: dist.ProcessGroup | None) -> _T:
    """Returns the first rank's value, on all ranks. Collective."""
    values = [value]
    if rank_and_world_size(group)[1] > 1:
        dist.broadcast_object_list(values, group_src=0, group=group)
    return values[0]


def gather_on_first_rank(value: _T, group: dist.ProcessGroup | None) -> list[_T]:
    """Returns every rank's value on the first rank, nothing on the others. Collective.

    The values come one after the other, so that no more than one of them is on its way, through a GPU's memory perhaps.
    """
    rank, world_size = rank_and_world_size(group)
    values = [value]
    for source in range(1, world_size):
        if rank == source:
            dist.send_object_list([value], group_dst=0, group=group)
        elif rank == 0:
            received: list[Any] = [None]
            dist.recv_object_list(received, group_src=source, group=group)
            values += received
    return values if rank == 0 else []
