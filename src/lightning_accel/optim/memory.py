"""How QAdam's tensors lie in memory: kernels walk through it, so gradient and state must lie as their parameter does."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


def check_dense(parameter: Tensor) -> None:
    """Raises ValueError unless the elements of a parameter lie densely in memory."""
    if torch.empty_like(parameter).stride() != parameter.stride():
        raise ValueError(
            "QAdam needs parameters whose elements lie densely in memory: got one of shape "
            f"{tuple(parameter.shape)} and strides {parameter.stride()}"
        )


def complete_state(parameter: Tensor, state: dict[str, Any]) -> None:
    """Fills in Adam's state where there is none, and lays it anew where it lies otherwise than the parameter."""
    if not state:
        state["step"] = torch.tensor(0.0, dtype=torch.float32, device="cpu")
        state["exp_avg"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
        state["exp_avg_sq"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
    for name in ("exp_avg", "exp_avg_sq"):
        if state[name].stride() != parameter.stride():  # loaded from, or made for, another memory format
            state[name] = torch.empty_like(parameter).copy_(state[name])


def step_addresses(parameter: Tensor, state: dict[str, Any]) -> tuple[int, int, int, int]:
    """Returns the addresses of gradient, momentum, variance and parameter, after making them lie alike."""
    complete_state(parameter, state)
    gradient = parameter.grad
    assert gradient is not None
    if gradient.stride() != parameter.stride():
        gradient = parameter.grad = torch.empty_like(parameter).copy_(gradient)
    return gradient.data_ptr(), state["exp_avg"].data_ptr(), state["exp_avg_sq"].data_ptr(), parameter.data_ptr()


def by_device_and_dtype(parameters: Iterable[Tensor]) -> dict[tuple[torch.device, torch.dtype], list[Tensor]]:
    """Sorts parameters by what a kernel takes one of."""
    kinds: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for parameter in parameters:
        kinds.setdefault((parameter.device, parameter.dtype), []).append(parameter)
    return kinds
