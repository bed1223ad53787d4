"""The rounds of training, as a state machine without torch.

A *round* is what leads to one optimizer step. It runs from the first forward with gradients to the first `before_step` after
it; a second optimizer's step in the same round sees nothing new. Rounds, not optimizer steps, are counted: a gradient scaler
may skip a step, on one rank only perhaps, and nothing that peers wait for may depend on it.
"""

from __future__ import annotations

from enum import Enum, auto


class RoundState(Enum):
    """Where training is."""

    BETWEEN = auto()
    """No forward has begun the next round."""

    OPEN = auto()
    """A forward has begun the round; no backward has reduced gradients in it."""

    REDUCED = auto()
    """A backward has reduced gradients in the round."""


class Rounds:
    """Counts rounds, and tells where they begin and end.

    Args:
        steps_end_rounds: Whether `end` is called by optimizer steps themselves. Then a round with reduced gradients is over
            when the next forward comes: a gradient scaler has skipped its step.

    Attributes:
        state: Current state.
        finished: Number of rounds finished so far.
    """

    def __init__(self, *, steps_end_rounds: bool) -> None:
        self.state = RoundState.BETWEEN
        self.finished = 0
        self._steps_end_rounds = steps_end_rounds

    def begin(self) -> bool:
        """Reports a forward with gradients, and returns whether it begins a round."""
        begins = self.state is RoundState.BETWEEN
        if begins:
            self.state = RoundState.OPEN
        return begins

    def reduce(self) -> None:
        """Reports a backward that reduces gradients; does nothing between rounds, where a second optimizer's may come."""
        if self.state is RoundState.OPEN:
            self.state = RoundState.REDUCED

    @property
    def is_skipped(self) -> bool:
        """Whether the round's step was skipped, asked when the next forward or a consensus comes before it."""
        # Where a strategy ends rounds it knows better: under manual optimisation this may be one more micro-batch.
        return self._steps_end_rounds and self.state is RoundState.REDUCED

    def end(self) -> bool:
        """Reports that an optimizer is about to step, and returns whether that ends a round."""
        ends = self.state is not RoundState.BETWEEN
        if ends:
            self.state = RoundState.BETWEEN
            self.finished += 1
        return ends

    def restore(self, finished: int) -> None:
        """Drops an open round, and continues counting from `finished`."""
        self.state = RoundState.BETWEEN
        self.finished = finished
