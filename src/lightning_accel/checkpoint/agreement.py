"""All ranks raise alike, or none."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

_T = TypeVar("_T")


def raise_together(action: Callable[[], _T], what: str, group: dist.ProcessGroup | None = None) -> _T:
    """Does it on this rank; where it failed on any, all ranks raise alike, so that none goes on alone. Collective.

    Raises:
        FileNotFoundError: if the first rank that failed raised it, and so ValueError.
        RuntimeError: if it raised anything else.
    """
    error: Exception | None = None
    try:
        done = action()
    except Exception as raised:
        error = raised
    name = type(error).__name__
    own = None if error is None else (name, f"rank {rank_and_world_size(group)[0]} could not {what}: {name}: {error}")
    for failure in all_gather(own, group):
        if failure is not None:
            name, message = failure
            raise {"FileNotFoundError": FileNotFoundError, "ValueError": ValueError}.get(name, RuntimeError)(message) from error
    return done


def rank_and_world_size(group: dist.ProcessGroup | None) -> tuple[int, int]:
    """Rank and world size; alone where there is no process group."""
    is_alone = not dist.is_initialized()
    return (0, 1) if is_alone else (dist.get_rank(group), dist.get_world_size(group))


def all_gather(value: Any, group: dist.ProcessGroup | None) -> list[Any]:
    """Every rank's value, in rank order. Collective."""
    values = [value] * rank_and_world_size(group)[1]
    if len(values) > 1:
        dist.all_gather_object(values, value, group=group)
    return values
