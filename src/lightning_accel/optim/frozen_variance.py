"""The variance v that QAdam freezes after T steps: whether it has settled, and the floor that it gets.

Where v_T is zero or tiny (an embedding row that warm-up has not seen), Adam's quotient would explode. Therefore

    v_T <- max(v_T, median / B^2),   B = (1 - beta1) / sqrt((1 - beta2) (1 - beta1^2 / beta2)),

with the median of the parameter's non-zero v_T. By Cauchy and Schwarz, B is the largest |m| / sqrt(v) that Adam itself can reach,
whatever the gradients (7.27 by default). With the floor, a gradient as large as is usual for the parameter moves an element at
most as far as Adam could. A parameter that no gradient has reached gets the smallest floor of the others.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

STABLE_RATIO = 0.96
"""How near to 1 the ratio of two norms must be for the variance to have settled (1-bit Adam, section 7.1)."""


def has_settled(norm: float, last_norm: float) -> bool:
    """Tells whether the variance's norm has changed little; `last_norm` is 0 where there is no earlier one."""
    return last_norm > 0 and min(norm, last_norm) >= STABLE_RATIO * max(norm, last_norm)


def settling_interval(optimizers: Sequence[Optimizer]) -> int:
    """Returns 1/(1 - beta2), the number of steps that the variance remembers; the longest of all groups."""
    betas = [group["betas"] for optimizer in optimizers for group in optimizer.param_groups]
    return round(1 / (1 - max(float(beta2) for _, beta2 in betas)))


def variance_norm(optimizer: Optimizer) -> float:
    """Returns the L1 norm of the bias-corrected variance of all parameters."""
    total = 0.0
    for group in optimizer.param_groups:
        correction = 1 - group["betas"][1] ** max(group["steps"], 1)
        for parameter in group["params"]:
            if parameter in optimizer.state:
                total += float(optimizer.state[parameter]["exp_avg_sq"].sum(dtype=torch.float64)) / correction
    return total


def find_floors(optimizer: Optimizer) -> dict[Tensor, float]:
    """Returns the floor of each parameter that a gradient has reached."""
    floors = {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter in optimizer.state:
                state = optimizer.state[parameter]
                reached = state["exp_avg_sq"][state["exp_avg_sq"] > 0]
                if reached.numel():
                    floors[parameter] = _rescaling(state, group) * float(reached.median()) / largest_ratio(*group["betas"]) ** 2
    return floors


def raise_to_floors(optimizer: Optimizer, floors: Mapping[Tensor, float]) -> None:
    """Raises the variance to its floors, in place; parameters without one get the smallest."""
    smallest = min(floors.values())
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            state = optimizer.state[parameter]
            state["exp_avg_sq"].mul_(_rescaling(state, group)).clamp_(min=floors.get(parameter, smallest))


def largest_ratio(beta1: float, beta2: float) -> float:
    """Returns B, the largest |m| / sqrt(v) that Adam can reach."""
    return (1 - beta1) / math.sqrt((1 - beta2) * (1 - beta1 * beta1 / beta2))


def _rescaling(state: Mapping[str, Any], group: Mapping[str, Any]) -> float:
    """Returns the factor for a parameter that had no gradient in some steps: its variance is corrected with the group's steps."""
    own_steps, beta2 = float(state.get("step", 0.0)), group["betas"][1]
    if own_steps in (0, group["steps"]):
        return 1.0
    return float((1 - beta2 ** group["steps"]) / (1 - beta2**own_steps))
