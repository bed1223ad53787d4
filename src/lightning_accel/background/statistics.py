"""What communication cost."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Statistics:
    """What communication cost this rank so far.

    Attributes:
        sent_bytes: bytes sent to other ranks.
        full_precision_bytes: bytes that an uncompressed ring all_reduce of the same tensors sends; where weights travel, of
            the gradients of every round.
        communication_seconds: spent in communication, most of it beside backward; queues that overlap count each.
        exposed_seconds: the training thread's share: it waited.
    """

    sent_bytes: int = 0
    full_precision_bytes: int = 0
    communication_seconds: float = 0.0
    exposed_seconds: float = 0.0
