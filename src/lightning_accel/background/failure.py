"""Failures of communication."""

from __future__ import annotations

from typing import Protocol

GRACE_SECONDS = 5.0
"""What a wait allows beyond the group's timeout, so that the backend's own, more telling error comes first."""


POLL_SECONDS = 0.2
"""How often a waiting thread looks up, so that Ctrl-C is heard."""


class CommunicationError(RuntimeError):
    """Background communication failed on this rank or, as seen from it, on another; training cannot go on.

    Its cause (`__cause__`) is the first error.
    """


class DeviceCollective(Protocol):
    """Communication that enqueues itself on a GPU, where no call of ours hears of its failure."""

    def check(self) -> None:
        """Raises if it has failed; does not wait."""

    def abort(self) -> None:
        """Lets it fail, on this rank; does not wait."""

    def close(self) -> None:
        """Waits for what is under way, and ends it."""
