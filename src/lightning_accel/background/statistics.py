"""What communication cost, counted from events."""

from __future__ import annotations

import threading
from dataclasses import dataclass, replace

from lightning_accel.background.events import CommEvent


@dataclass
class Statistics:
    """What communication cost this rank so far.

    Attributes:
        sent_bytes: Bytes sent to other ranks.
        full_precision_bytes: Bytes that an uncompressed ring all_reduce of the same tensors sends; where weights travel, of
            the gradients of every round.
        communication_seconds: Time spent in communication, most of it beside backward; queues that overlap count each.
        exposed_seconds: The training thread's share: the time it waited.
    """

    sent_bytes: int = 0
    full_precision_bytes: int = 0
    communication_seconds: float = 0.0
    exposed_seconds: float = 0.0


class Counters:
    """Adds up statistics; queues and the training thread may add at once."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._sums = Statistics()

    def observe(self, event: CommEvent) -> None:
        """Adds a step's bytes and seconds."""
        with self._lock:
            self._sums.sent_bytes += event.sent_bytes
            self._sums.communication_seconds += event.seconds

    def add_full_precision(self, num_bytes: int) -> None:
        """Adds to the bytes that would have been sent uncompressed."""
        with self._lock:
            self._sums.full_precision_bytes += num_bytes

    def add_exposed(self, seconds: float) -> None:
        """Adds to the time for which the training thread waited."""
        with self._lock:
            self._sums.exposed_seconds += seconds

    def read(self) -> Statistics:
        """Returns a copy of the sums."""
        with self._lock:
            return replace(self._sums)
