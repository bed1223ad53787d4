"""Checks that options of several algorithms share."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from typing import Any

_SHARDING = re.compile("fsdp|shard|zero|deepspeed|offload|wrap_policy|tensor_parallel|data_parallel_size")
"""Words that ask for a model in pieces."""


def check_average(value: object) -> None:
    """Raises ValueError unless `value` is True or False."""
    if not isinstance(value, bool):
        raise ValueError(f"average must be True or False: got {value!r}")


def nearest(word: object, words: Sequence[str] | dict[str, Any]) -> str:
    """The end of a message: which of the valid words comes near to a wrong one."""
    close = difflib.get_close_matches(str(word), list(words), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def hint(word: object, words: Sequence[str] | dict[str, Any]) -> str:
    """The end of a message: the nearest valid word, or what there is for those who look for sharding."""
    if (near := nearest(word, words)) or not _SHARDING.search(str(word)):
        return near
    return (
        "; nothing is sharded here, each rank holds the whole model (DDP). To shard it use Lightning's strategy='fsdp' or "
        "torch's fully_shard; what they send is not compressed."
    )


def check_communication_interval(value: object) -> None:
    """Raises ValueError unless `value` is a whole number from 1 on."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"communication_interval must be a whole number of rounds, 1 or more: got {value!r}")


def check_hierarchical(value: object) -> None:
    """Raises ValueError unless `value` is True, False or "auto"."""
    if not isinstance(value, bool) and value != "auto":
        raise ValueError(f'hierarchical must be True, False or "auto": got {value!r}')


def is_integer(value: object) -> bool:
    """Whether `value` is a whole number; True and False are not."""
    return isinstance(value, int) and not isinstance(value, bool)
