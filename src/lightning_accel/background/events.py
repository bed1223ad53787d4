"""One place where all communication is seen: every step reports what it sent and how long it took."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class CommEvent:
    """A step of communication that is done on this rank.

    Attributes:
        label: What was communicated, such as "bucket 3".
        step: Name of the step, such as "encode".
        queue: Name of the queue it ran in.
        sent_bytes: Bytes that this rank sent to others in it.
        seconds: Time it took on the host; on NCCL that is the time to enqueue it.
    """

    label: str
    step: str
    queue: str
    sent_bytes: int
    seconds: float


Observer = Callable[[CommEvent], None]
"""Hears of each step, on the thread that ran it: it must be quick. If it raises, communication has failed."""


class Events:
    """Hands events to observers."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._observers: tuple[Observer, ...] = ()

    def subscribe(self, observer: Observer) -> Callable[[], None]:
        """Lets an observer hear of all steps from now on; returns what ends that."""
        with self._lock:
            self._observers = (*self._observers, observer)

        def unsubscribe() -> None:
            with self._lock:
                self._observers = tuple(other for other in self._observers if other is not observer)

        return unsubscribe

    def emit(self, event: CommEvent) -> None:
        """Hands an event to all observers, in the order in which they subscribed."""
        for observer in self._observers:
            observer(event)
