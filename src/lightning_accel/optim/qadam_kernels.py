"""QAdam's two native passes over parameters in memory.

Each takes a tuple for each parameter: the addresses of tensors that lie alike and densely, then their number of elements.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from lightning_accel import _native
from lightning_accel.native import DTYPES, run_kernel

Kind = tuple[torch.device, torch.dtype]


def by_kind(parameters: Iterable[Tensor]) -> Iterator[tuple[Kind, list[Tensor]]]:
    """Groups parameters by device and dtype, because a pass takes one of each."""
    kinds: dict[Kind, list[Tensor]] = {}
    for parameter in parameters:
        kinds.setdefault((parameter.device, parameter.dtype), []).append(parameter)
    return iter(kinds.items())


def fold_gradients(
    kind: Kind, tensors: Sequence[tuple[int, int, int, int]], beta1: float, weight_decay: float, num_threads: int
) -> None:
    """Turns gradients g into momenta in place: g <- beta1 m + (1 - beta1) (g + weight_decay x); `tensors` names g, m, x."""
    device, dtype = kind
    run_kernel(_native.qadam_fold, device, DTYPES.index(dtype), tensors, beta1, weight_decay, num_threads)


def step_with_momentum(kind: Kind, tensors: Sequence[tuple[int, int, int, int, int]], *scalars: float) -> None:
    """Steps with the momentum that g holds: m <- g, x <- decay x - step_size m / (sqrt(v) / correction + eps).

    Args:
        kind: Device and dtype.
        tensors: Addresses of g, m, v, x and number of elements.
        *scalars: step_size, correction, eps, decay.
    """
    device, dtype = kind
    run_kernel(_native.qadam_step, device, DTYPES.index(dtype), tensors, *scalars, torch.get_num_threads())
