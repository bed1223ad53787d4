"""Asynchronous averaging: each rank trains by itself, and averagings in the background add corrections to its weights.

    step:       x_r <- x_r + u_r
    snapshot:   v_r <- x_r
    averaging:  s = 1/n sum_r v_r,  d_r <- d_r + s - v_r,  v_r <- s
    correction: x_r <- x_r + d_r,  d_r <- 0
    consensus:  correction on all ranks,  x_r, v_r <- 1/n sum_r x_r

In exact arithmetic, whatever the order of these events:

- An averaging changes no sum: sum_r (s - v_r) = 0, so sum_r (x_r + d_r) is changed by steps alone, each counted once. A
  correction moves its rank's d_r to x_r, and a second one adds nothing.
- Local progress survives: x_r is x_r at the start, plus its own steps, plus its corrections; nothing overwrites it but consensus.
- A rank that gave no new snapshot contributes v_r = s of the averaging before. Its corrections telescope to s - v_r, with s
  of the last averaging and v_r of its last snapshot, whatever happened in between.

An averaging that takes time is one event here: while it is in flight there are no snapshots and no corrections, and steps
change neither v nor d.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_accel.reference.weights import mean


class AsyncAverage:
    """One parameter on n ranks.

    Args:
        weights: Weights of each rank; float16 and bfloat16 are averaged in float32.

    Attributes:
        x: Weights of each rank.
        v: Contributions to the next averaging.
        d: Corrections not applied yet.
    """

    def __init__(self, weights: Sequence[Tensor]) -> None:
        self.x = [tensor.clone() for tensor in weights]
        self.v = [_wide(tensor) for tensor in weights]
        self.d = [torch.zeros_like(tensor) for tensor in self.v]

    def step(self, rank: int, update: Tensor) -> None:
        """Adds what the optimizer adds to the weights."""
        self.x[rank] = self.x[rank] + update

    def snapshot(self, rank: int) -> None:
        """Contributes the weights; at the start of a round, when the interval has passed."""
        self.v[rank] = _wide(self.x[rank])

    def average(self) -> None:
        """Averages the contributions; corrections that were not applied yet stay in d."""
        s = mean(self.v)
        self.d = [d - v + s for d, v in zip(self.d, self.v, strict=True)]
        self.v = [s.clone() for _ in self.v]

    def correct(self, rank: int) -> None:
        """Applies a rank's correction; at the start of a round, when no averaging is in flight."""
        self.x[rank] = (self.x[rank] + self.d[rank]).to(self.x[rank].dtype)
        self.d[rank] = torch.zeros_like(self.d[rank])

    def consensus(self) -> None:
        """Makes all ranks' weights equal; before validation, test, predict, checkpoint and the end of fit."""
        for rank in range(len(self.x)):
            self.correct(rank)
        s = mean([_wide(x) for x in self.x])
        self.x = [s.to(x.dtype) for x in self.x]
        self.v = [s.clone() for _ in self.v]


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32), copy=True)
