"""Error feedback: what codes have lost is kept on each rank until it can be sent."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
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


@dataclass(frozen=True)
class ResidualPlace:
    """Where a parameter's residuals of one kind are.

    Attributes:
        kind: "worker" or "server".
        first: First residual.
        numel: Number of residuals.
    """

    kind: str
    first: int
    numel: int


class ErrorFeedback:
    """Residuals of a whole model: the *committed* ones, and the *pending* ones, which the last messages have left.

    A message reads committed residuals and writes pending ones, or it goes on from pending ones in place. Pending residuals
    count once a step has used what the message delivered: `commit`. Until then a message can be taken back, as a gradient scaler
    does that skips a step, at the price of twice the memory.

    Args:
        places: Places of each parameter's residuals.
        worker_numel: Elements that this rank sends.
        server_numel: Elements that this rank sums.
        device: Device of the model.

    Memory: 8 bytes for each of these elements.
    """

    def __init__(
        self, places: Sequence[Sequence[ResidualPlace]], worker_numel: int, server_numel: int, device: torch.device
    ) -> None:
        numels = {"worker": worker_numel, "server": server_numel}
        self._places = places
        self._committed, self._pending = (
            {kind: torch.zeros(numel, dtype=torch.float32, device=device) for kind, numel in numels.items()} for _ in range(2)
        )

    def take(self, *, from_pending: bool) -> Feedback:
        """Returns the residuals for one tensor's messages.

        Args:
            from_pending: Whether the messages go on from pending residuals, in place; else they start from committed ones.
        """
        old = self._pending if from_pending else self._committed
        return Feedback(**{kind: Residuals(old[kind], self._pending[kind]) for kind in old})

    def reset(self, parameters: Collection[int], unless: torch.Tensor | None = None) -> None:
        """Makes the pending residuals of some parameters the committed ones.

        Args:
            parameters: The parameters.
            unless: A boolean on the residuals' device; if it is true, nothing changes. It is not waited for.
        """
        for parameter in parameters:
            for committed, pending in zip(self._of(self._committed, parameter), self._of(self._pending, parameter), strict=True):
                if unless is None:
                    pending.copy_(committed)
                else:
                    torch.where(unless, pending, committed, out=pending)

    def pending(self, parameter: int) -> list[torch.Tensor]:
        """Returns copies of a parameter's pending residuals."""
        return [residuals.clone() for residuals in self._of(self._pending, parameter)]

    def restore_pending(self, parameter: int, copies: Sequence[torch.Tensor]) -> None:
        """Restores what `pending` returned."""
        for residuals, copy in zip(self._of(self._pending, parameter), copies, strict=True):
            residuals.copy_(copy)

    def commit(self, parameters: Collection[int] | None = None) -> None:
        """Makes the committed residuals of some parameters, or of all, the pending ones."""
        if parameters is None:
            self._committed, self._pending = self._pending, self._committed
            return
        for parameter in parameters:
            for committed, pending in zip(self._of(self._committed, parameter), self._of(self._pending, parameter), strict=True):
                committed.copy_(pending)

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Returns the committed residuals themselves, which later commits overwrite."""
        return dict(self._committed)

    def load_state_dict(self, state: Mapping[str, torch.Tensor]) -> None:
        """Restores what `state_dict` returned on this rank.

        Raises:
            ValueError: For the state of another model or number of ranks.
        """
        for kind, residuals in self._committed.items():
            if state[kind].shape != residuals.shape:
                raise ValueError(
                    f"{kind} residuals have {residuals.numel()} elements, the state has {state[kind].numel()}: it is of another "
                    "model, number of ranks or hierarchy"
                )
            residuals.copy_(state[kind])

    def drop(self) -> None:
        """Sets the committed residuals to zero."""
        for residuals in self._committed.values():
            residuals.zero_()

    def _of(self, memory: Mapping[str, torch.Tensor], parameter: int) -> list[torch.Tensor]:
        return [memory[place.kind][place.first : place.first + place.numel] for place in self._places[parameter]]
