"""What codes have lost, kept on each rank until it can be sent: residuals of a two-shot all_reduce."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch

from lightning_accel.codecs import Residuals
from lightning_accel.collectives import Feedback


class ErrorFeedback:
    """Residuals of a whole model, which a step that was skipped leaves as they were.

    A backward reads the residuals of the last step and writes new ones beside them; `commit` makes these the residuals. A
    gradient scaler that skips a step therefore loses nothing, at the price of twice the memory.

    Args:
        worker_numel: elements that this rank sends.
        server_numel: elements that this rank sums.
        device: of the model.

    Memory: 8 bytes for each of these elements.
    """

    def __init__(self, worker_numel: int, server_numel: int, device: torch.device) -> None:
        self._memory = [
            {"worker": torch.zeros(worker_numel, device=device), "server": torch.zeros(server_numel, device=device)}
            for _ in range(2)
        ]
        self._has_written = False

    def take(self) -> Feedback:
        """Residuals for one bucket of a backward. All of a backward's buckets take them before `commit`."""
        self._has_written = True
        old, updated = self._memory
        return Feedback(**{kind: Residuals(old[kind], updated[kind]) for kind in ("worker", "server")})

    def commit(self, ranges: Iterable[tuple[str, int, int]] | None = None) -> None:
        """Takes up what the last backward wrote: all of it, or kind, first residual and number of some. Nothing without one."""
        if not self._has_written:
            return
        if ranges is None:
            self._has_written = False
            self._memory.reverse()
            return
        old, updated = self._memory
        for kind, first, numel in ranges:
            old[kind][first : first + numel].copy_(updated[kind][first : first + numel])

    def state_dict(self) -> dict[str, torch.Tensor]:
        """The residuals, as copies."""
        return {kind: residuals.clone() for kind, residuals in self._memory[0].items()}

    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        """Takes up what `state_dict` gave on this rank.

        Raises:
            ValueError: if it is of another model or number of ranks.
        """
        for kind, residuals in self._memory[0].items():
            if state[kind].shape != residuals.shape:
                raise ValueError(
                    f"{kind} residuals have {residuals.numel()} elements, the state has {state[kind].numel()}: it is of another "
                    "model, number of ranks or hierarchy"
                )
            residuals.copy_(state[kind])
        self._has_written = False
