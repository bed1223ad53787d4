"""When QAdam's warm-up ends: in the same round on all ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lightning_accel.optim.frozen_variance import has_settled


class WarmupAgreement:
    """Decides in which round warm-up ends. A gradient scaler may have skipped steps on one rank, so ranks agree.

    Args:
        agree: Function that returns the least of all ranks' values; collective, and called as rarely as possible.
    """

    def __init__(self, agree: Callable[[int], int]) -> None:
        self._agree = agree
        # Upper bound of the steps that all ranks have made: agreed upon once, then counted in rounds until they may be enough.
        self._agreed_steps: int | None = None
        self._due_step = 0
        self._last_norm = 0.0

    def ends(self, steps: int, interval: int, norm: Callable[[], float] | None = None) -> bool:
        """Tells, once before each round of warm-up, whether warm-up has ended.

        Args:
            steps: Number of steps this rank has made.
            interval: Number of steps in warm-up; with `norm`, number of steps between two comparisons.
            norm: Function that returns the variance's norm on this rank; None where the number of steps alone decides.
        """
        self._due_step = self._due_step or interval
        if self._agreed_steps is None or self._agreed_steps >= self._due_step:
            self._agreed_steps = self._agree(steps)
        ends = self._agreed_steps >= self._due_step
        if ends and norm is not None:
            self._due_step = self._agreed_steps + interval
            new, last = norm(), self._last_norm
            self._last_norm = new
            # The last bits of the ranks' norms may differ, and more where a scaler has skipped a step.
            ends = bool(self._agree(int(has_settled(new, last))))
        self._agreed_steps += 1
        return ends

    def recount(self) -> None:
        """Makes ranks agree anew in the next round, because a loaded state has changed the number of steps."""
        self._agreed_steps = None

    def state_dict(self) -> dict[str, Any]:
        """Returns what a resumed run needs."""
        return {"due_step": self._due_step, "last_norm": self._last_norm}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what `state_dict` returned."""
        self._due_step, self._last_norm = int(state["due_step"]), float(state["last_norm"])
        self.recount()
