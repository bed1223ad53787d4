"""Error feedback: what codes have lost is kept on each rank until it can be sent."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Residuals:
    """What codes have lost of earlier values, to be added to the next ones.

    v = x + old, the message is v's code, and `updated` becomes v minus the message's value; where that is not finite, as in a
    block that is poisoned by NaN or Inf, `updated` becomes `old`.

    Attributes:
        old: float32, one-dimensional, indexed by the plan's residual offsets.
        updated: Of the same kind; may be `old` itself.
    """

    old: torch.Tensor
    updated: torch.Tensor


def residual_addresses(residuals: Residuals | None, device: torch.device) -> tuple[int, int, int]:
    """Returns the addresses of old and updated residuals and their number, for native operations; zeros for none.

    Raises:
        ValueError: For residuals of another kind, or on another device.
    """
    if residuals is None:
        return 0, 0, 0
    for name, memory in (("old", residuals.old), ("updated", residuals.updated)):
        if memory.dtype != torch.float32 or memory.dim() != 1 or not memory.is_contiguous() or memory.device != device:
            raise ValueError(
                f"residuals must be one-dimensional, contiguous, float32 on {device}: `{name}` is {memory.dtype} of shape "
                f"{tuple(memory.shape)} on {memory.device}"
            )
    numel = min(residuals.old.numel(), residuals.updated.numel())
    return residuals.old.data_ptr(), residuals.updated.data_ptr(), numel


@dataclass(frozen=True)
class Feedback:
    """Residuals of a two-shot all_reduce.

    Attributes:
        worker: Of what this rank sends, by `OwnedSpan.place`.
        server: Of the sums that this rank makes, by `Sums.place`.
    """

    worker: Residuals
    server: Residuals


class ErrorFeedback:
    """Residuals of a whole model, which a skipped step leaves as they were.

    A backward reads the residuals of the last step and writes new ones beside them; `commit` makes these the residuals. A
    gradient scaler that skips a step therefore loses nothing, at the price of twice the memory.

    Args:
        worker_numel: Elements that this rank sends.
        server_numel: Elements that this rank sums.
        device: Device of the model.

    Memory: 8 bytes for each of these elements.
    """

    def __init__(self, worker_numel: int, server_numel: int, device: torch.device) -> None:
        numels = {"worker": worker_numel, "server": server_numel}
        self._memory = [
            {kind: torch.zeros(numel, dtype=torch.float32, device=device) for kind, numel in numels.items()} for _ in range(2)
        ]
        self._has_written = False

    def take(self) -> Feedback:
        """Returns the residuals for one tensor of a backward. All of a backward's tensors take them before `commit`."""
        self._has_written = True
        old, updated = self._memory
        return Feedback(**{kind: Residuals(old[kind], updated[kind]) for kind in ("worker", "server")})

    def commit(self, ranges: Iterable[tuple[str, int, int]] | None = None) -> None:
        """Keeps what the last backward wrote. Does nothing without one.

        Args:
            ranges: Kind, first residual and number of those to keep; None keeps all.
        """
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
        """Returns the residuals themselves, which the next steps overwrite."""
        return dict(self._memory[0])

    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        """Restores what `state_dict` returned on this rank.

        Raises:
            ValueError: For the state of another model or number of ranks.
        """
        for kind, residuals in self._memory[0].items():
            if state[kind].shape != residuals.shape:
                raise ValueError(
                    f"{kind} residuals have {residuals.numel()} elements, the state has {state[kind].numel()}: it is of another "
                    "model, number of ranks or hierarchy"
                )
            residuals.copy_(state[kind])
        self._has_written = False

    def reset(self) -> None:
        """Sets the residuals to zero."""
        for residuals in self._memory[0].values():
            residuals.zero_()
        self._has_written = False
