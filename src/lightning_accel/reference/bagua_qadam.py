"""QAdam with Bagua's deviations."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from lightning_accel.reference.qadam import QAdam


class BaguaQAdam(QAdam):
    """The optimizer of all ranks, as Bagua has it; `error_feedback` is to be False."""

    def _warmup_step(self, place: int, gradient: Tensor) -> None:
        """Drops the gradient of step T and uses the momentum of the step before again."""
        if self.steps == self.warmup_steps:
            self._update(place)
        else:
            super()._warmup_step(place, gradient)

    def _fold(self, place: int, gradients: Sequence[Tensor], momentum: Tensor | None) -> list[Tensor]:
        """Loses weight decay."""
        self.weight_decay = 0.0
        return super()._fold(place, gradients, momentum)

    def _correction_steps(self) -> int:
        """Lets the bias correction of the frozen variance go on."""
        return self.steps

    def _raise_to_floor(self) -> None:
        """Leaves the variance without a floor."""
