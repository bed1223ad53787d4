"""QAdam with Bagua's deviations: no error feedback, and what the methods of `BaguaQAdam` say."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from lightning_accel.reference.qadam import QAdam


class BaguaQAdam(QAdam):
    """The optimizer of all ranks; takes the arguments of `QAdam` except `error_feedback`."""

    def __init__(self, parameters: Sequence[Tensor], world_size: int, **options: Any) -> None:
        super().__init__(parameters, world_size, error_feedback=False, **options)

    def _warmup_step(self, place: int, gradient: Tensor) -> None:
        """Drops the gradient of step T and uses the momentum of the step before again."""
        if self.steps == self.warmup_steps:
            self._update(place)
        else:
            super()._warmup_step(place, gradient)

    def _compressed_step(self, place: int, gradients: Sequence[Tensor]) -> None:
        """Loses weight decay."""
        self.weight_decay = 0.0
        super()._compressed_step(place, gradients)

    def _correction_steps(self) -> int:
        """Lets the bias correction of the frozen variance go on."""
        return self.steps

    def _raise_to_floor(self) -> None:
        """Leaves the variance without a floor."""
