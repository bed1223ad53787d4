"""When a round begins and ends: every event in every state."""

import sys

import pytest

from helpers import programs
from lightning_accel.data_parallel.rounds import Rounds, RoundState

BETWEEN, OPEN, REDUCED = RoundState


def rounds_in(state: RoundState, *, steps_end_rounds: bool = True) -> Rounds:
    """Two rounds are finished; then the events that lead to a state."""
    rounds = Rounds(steps_end_rounds=steps_end_rounds)
    rounds.restore(2)
    if state is not BETWEEN:
        rounds.begin()
    if state is REDUCED:
        rounds.reduce()
    assert rounds.state is state
    return rounds


@pytest.mark.parametrize("steps_end_rounds", [True, False])
@pytest.mark.parametrize(
    ("state", "event", "answer", "after", "finished"),
    [
        (BETWEEN, "begin", True, OPEN, 2),
        (OPEN, "begin", False, OPEN, 2),
        (REDUCED, "begin", False, REDUCED, 2),
        (BETWEEN, "reduce", None, BETWEEN, 2),
        (OPEN, "reduce", None, REDUCED, 2),
        (REDUCED, "reduce", None, REDUCED, 2),
        (BETWEEN, "end", False, BETWEEN, 2),
        (OPEN, "end", True, BETWEEN, 3),
        (REDUCED, "end", True, BETWEEN, 3),
    ],
)
def test_every_transition(state, event, answer, after, finished, steps_end_rounds):
    """Catches a micro-batch that begins a round again or forgets that gradients were reduced, a step outside a round that is
    counted, a step without reduced gradients (all micro-batches in no_sync) that is not, and rounds counted when they begin."""
    rounds = rounds_in(state, steps_end_rounds=steps_end_rounds)
    assert getattr(rounds, event)() is answer
    assert (rounds.state, rounds.finished) == (after, finished)


@pytest.mark.parametrize(
    ("state", "steps_end_rounds", "is_skipped"),
    [
        (BETWEEN, True, False),
        (OPEN, True, False),
        (REDUCED, True, True),
        (BETWEEN, False, False),
        (OPEN, False, False),
        (REDUCED, False, False),
    ],
)
def test_a_skipped_step_is_told_by_reduced_gradients(state, steps_end_rounds, is_skipped):
    """Catches a micro-batch in no_sync that is taken for a skipped step, and a strategy's rounds that end before it says so."""
    assert rounds_in(state, steps_end_rounds=steps_end_rounds).is_skipped is is_skipped


def test_asking_changes_nothing():
    """Catches a skipped round that is ended by the question, and then not by the algorithm."""
    rounds = rounds_in(REDUCED)
    assert rounds.is_skipped
    assert rounds.is_skipped
    assert (rounds.state, rounds.finished) == (REDUCED, 2)


def test_a_backward_after_the_step_belongs_to_no_round():
    """Catches gradients of a second optimizer, reduced after the round has ended, that mark the next round as reduced: its
    first micro-batch would be taken for a skipped step."""
    rounds = rounds_in(REDUCED)
    rounds.end()
    rounds.reduce()
    rounds.begin()
    assert not rounds.is_skipped
    assert rounds.state is OPEN


@pytest.mark.parametrize("state", list(RoundState))
def test_a_restored_count_stands_between_two_rounds(state):
    """Catches a step after a resume that ends the round which was open before it."""
    rounds = rounds_in(state)
    rounds.restore(41)
    assert (rounds.state, rounds.finished) == (BETWEEN, 41)
    assert rounds.end() is False
    assert rounds.begin() is True


def test_a_new_machine_stands_before_its_first_round():
    """Catches a step before the first forward that is counted."""
    rounds = Rounds(steps_end_rounds=True)
    assert (rounds.state, rounds.finished) == (BETWEEN, 0)


def test_rounds_do_without_torch():
    """Catches an import that ties the state machine to tensors."""
    code = "import sys, lightning_accel.data_parallel.rounds; assert 'torch' not in sys.modules"
    done = programs.run(sys.executable, "-c", code)
    assert done.returncode == 0, done.stderr
