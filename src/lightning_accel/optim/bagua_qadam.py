"""QAdam with Bagua's arithmetic, for runs that are compared with old ones."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_accel.optim.memory import complete_state
from lightning_accel.optim.qadam import QAdam


class BaguaQAdam(QAdam):
    """Reproduces what Bagua's QAdam does differently; `QAdam(..., bagua_compat=True)` makes it.

    The gradient of step T is dropped, the bias correction of the frozen variance goes on changing, weight decay is lost after
    warm-up, and there is neither a floor under the variance nor error feedback.
    """

    bagua_compat: ClassVar[bool] = True
    default_error_feedback: ClassVar[bool] = False
    prefers_fused: ClassVar[bool] = False

    @torch.no_grad()
    def _warmup_step(self) -> None:
        if self.steps + 1 != self.warmup_steps:
            super()._warmup_step()
            return
        # Step T drops its gradient and uses the momentum of the step before again.
        for group in self.param_groups:
            steps = group["steps"] + 1
            beta1, beta2 = group["betas"]
            for parameter in group["params"]:
                if parameter.grad is not None:
                    state = self.state[parameter]
                    complete_state(parameter, state)
                    state["step"] += 1
                    denominator = state["exp_avg_sq"].sqrt() / math.sqrt(1 - beta2**steps) + group["eps"]
                    parameter.addcdiv_(state["exp_avg"], denominator, value=-float(group["lr"]) / (1 - beta1**steps))

    def _raise_variance(self, floors: Mapping[Tensor, float]) -> None:
        pass

    def _correction_steps(self, group: Mapping[str, Any]) -> int:
        return int(group["steps"]) + 1

    def split_weight_decay(self, group: Mapping[str, Any]) -> tuple[float, float]:
        """Returns zeros."""
        return 0.0, 0.0
