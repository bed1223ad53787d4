"""Work under way, and the failure that ends all of it.

The first failure poisons communication for good. A collective that one rank missed would let its peers pair later ones up
wrongly and train on with wrong gradients, so nothing more is issued, and everything pending and later fails with it.
"""

from __future__ import annotations

import threading
import time
import traceback
from collections.abc import Callable

import torch

GRACE_SECONDS = 5.0
"""What a wait allows beyond the group's timeout, so that the backend's own, more telling error comes first."""

_POLL_SECONDS = 0.2
"""How often a waiting thread looks up, so that Ctrl-C is heard."""


class CommunicationError(RuntimeError):
    """Background communication failed on this rank or, as seen from it, on another; training cannot go on.

    Its cause (`__cause__`) is the first error.
    """


class PendingWork:
    """One tensor's communication.

    Args:
        label: What it is, for messages.
        tensor: What `future` delivers: overwritten, or as it is after a failure.
    """

    def __init__(self, label: str, tensor: torch.Tensor) -> None:
        self.label = label
        self.tensor = tensor
        self.future: torch.futures.Future[torch.Tensor] = torch.futures.Future(
            devices=[tensor.device] if tensor.is_cuda else None
        )

    def deliver(self) -> torch.futures.Future[torch.Tensor]:
        """Completes the future."""
        self.future.set_result(self.tensor)
        return self.future


class WorkTracker:
    """Knows what is under way, lets the training thread wait for it within bounds, and ends it all at the first failure.

    Args:
        name: Name of the algorithm, for messages.
        place: "rank 1 of 4", for messages.
        limit_seconds: Longest wait without progress.
        on_failure: Called once, at the first failure, before anything pending is delivered; must not wait.
    """

    def __init__(self, name: str, place: str, limit_seconds: float, on_failure: Callable[[], None]) -> None:
        self._name = name
        self._place = place
        self._limit_seconds = limit_seconds
        self._on_failure = on_failure
        self._changed = threading.Condition()
        self._pending: list[PendingWork] = []
        self._detached: list[str] = []
        self._failure: CommunicationError | None = None
        self._is_closed = False

    @property
    def has_failed(self) -> bool:
        """Whether anything has failed."""
        return self._failure is not None

    @property
    def is_idle(self) -> bool:
        """Whether no tensor's communication is pending."""
        return not self._pending

    def begin(self, work: PendingWork) -> bool:
        """Notes work as pending; returns False when communication has failed and nothing more may be issued."""
        with self._changed:
            if self._failure is None:
                self._check_open(work.label)
                self._pending.append(work)
            return self._failure is None

    def finish(self, work: PendingWork) -> None:
        """Delivers work, unless a failure has delivered it before."""
        with self._changed:
            if work not in self._pending:
                return
            self._pending.remove(work)
            self._changed.notify_all()
        work.deliver()

    def begin_detached(self, label: str) -> bool:
        """Notes a procedure that `join` waits for and `wait` does not; returns False when communication has failed."""
        with self._changed:
            if self._failure is None:
                self._check_open(label)
                self._detached.append(label)
            return self._failure is None

    def finish_detached(self, label: str) -> None:
        """Notes the end of such a procedure."""
        with self._changed:
            self._detached.remove(label)
            self._changed.notify_all()

    def wait(self) -> None:
        """Waits for all pending work, within the limit from the last progress on."""
        progress = time.perf_counter()
        with self._changed:
            first = None
            while self._pending:
                now = time.perf_counter()
                if self._pending[0] is not first:
                    first, progress = self._pending[0], now
                elif now - progress > self._limit_seconds:
                    self.fail(TimeoutError(f"nothing came back within {self._limit_seconds:.0f} s"), first.label)
                self._changed.wait(_POLL_SECONDS)

    def join(self, label: str) -> None:
        """Waits for all detached procedures, at most for the limit; `label` says what is waited for."""
        started = time.perf_counter()
        with self._changed:
            while self._detached and self._failure is None:
                if time.perf_counter() - started > self._limit_seconds:
                    self.fail(TimeoutError(f"other ranks did not join within {self._limit_seconds:.0f} s"), label)
                self._changed.wait(_POLL_SECONDS)

    def check(self) -> None:
        """Raises CommunicationError if anything has failed."""
        if self._failure is not None:
            # A new object each time: one that is raised again drags its old traceback along.
            raise CommunicationError(*self._failure.args) from self._failure.__cause__

    def fail(self, error: BaseException, label: str) -> None:
        """Notes a failure, the first one for good, and delivers all that is pending with its local value."""
        with self._changed:
            if self._failure is None:
                self._failure = CommunicationError(
                    f"{self._name}: {label} failed on {self._place}: {type(error).__name__}: {error}. "
                    "No rank steps with what has arrived. If another rank failed first, its log has the cause; else look for a "
                    "rank that was killed, is stuck, or cannot be reached over the network."
                )
                self._failure.__cause__ = error
                # A traceback keeps the variables of its frames, the group among them, and with it the connections.
                traceback.clear_frames(error.__traceback__)
                self._on_failure()
            pending, self._pending = self._pending, []
            self._changed.notify_all()
        for work in pending:
            work.deliver()

    def close(self) -> None:
        """Lets nothing begin any more; what is under way fails."""
        with self._changed:
            self._is_closed = True
            unfinished = [work.label for work in self._pending] + self._detached
        for label in unfinished[:1]:
            self.fail(RuntimeError("communication was closed before it was done"), label)

    def _check_open(self, label: str) -> None:
        if self._is_closed:  # a thread started now would stay
            raise RuntimeError(f"{self._name}: {label} was started after communication was closed")
