"""Checks that options of several algorithms share."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Any


def check_average(value: object) -> None:
    """Raises ValueError unless `value` is True or False."""
    if not isinstance(value, bool):
        raise ValueError(f"average must be True or False: got {value!r}")


def nearest(word: object, words: Sequence[str] | dict[str, Any]) -> str:
    """The end of a message: which of the valid words comes near to a wrong one."""
    close = difflib.get_close_matches(str(word), list(words), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


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
