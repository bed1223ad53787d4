"""Lines in the log about waits for other ranks that have become long."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from lightning_accel.logs import get_log

FIRST_SECONDS = 10.0
"""Time until the first line."""

AGAIN_SECONDS = 30.0
"""Time from one line to the next."""

_log = get_log(__name__)


class LongWait:
    """A wait that begins now."""

    def __init__(self) -> None:
        self._started = time.monotonic()
        self._due_seconds = FIRST_SECONDS

    @property
    def seconds(self) -> float:
        """Time waited so far."""
        return time.monotonic() - self._started

    def look(self, describe: Callable[[], str]) -> None:
        """Writes what is waited for, as `describe` says, when it is time for that; called every now and then."""
        if self.seconds >= self._due_seconds:
            _log.warning("%s (%.0f s so far)", describe(), self.seconds)
            self._due_seconds = self.seconds + AGAIN_SECONDS


def name_ranks(ranks: Sequence[int]) -> str:
    """Lists ranks for a message, such as "rank 1" or "ranks 0, 2 and 5"; no more than ten of them."""
    names = [str(rank) for rank in ranks[:10]] + ([f"{len(ranks) - 10} more"] if len(ranks) > 10 else [])
    return f"rank {names[0]}" if len(names) == 1 else f"ranks {', '.join(names[:-1])} and {names[-1]}"
