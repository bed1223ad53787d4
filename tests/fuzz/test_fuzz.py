"""Random programs, the same ones each time; `make fuzz` runs others, for as long as it is told to."""

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings

from fuzz import checks
from fuzz.programs import Evaluate, Fail, Model, Optimizer, Program, Remake, Resume, Train, programs
from fuzz.run import Outcome, Pool

BUDGET = 25
"""Programs of the ordinary suite: about 20 seconds."""


@pytest.fixture
def pool():
    with Pool() as ranks:
        yield ranks


@pytest.mark.timeout(280)
def test_random_programs(pool):
    """Catches whatever `checks.py` looks for, in programs that nobody thought of."""
    expected: set[str] = set()

    @settings(
        max_examples=BUDGET,
        derandomize=True,
        deadline=None,
        database=None,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )
    @given(programs())
    def run(program: Program) -> None:
        for finding in checks.check(program, pool):
            if finding.known_as is None:
                raise AssertionError(f"{finding.kind}: {finding.detail}\nfor test_found.py: {program!r}")
            expected.add(finding.known_as)

    run()
    if expected:
        pytest.xfail("; ".join(sorted(expected)))


def test_programs_print_as_python():
    """Catches a program that cannot be pasted into test_found.py."""
    program = Program(
        "decentralized",
        {"communication_interval": 2},
        model=Model(widths=(7, 33), teacher=True),
        optimizers=(Optimizer("adam", (1,)), Optimizer(told=False)),
        operations=(Train(times=3, skipped_on=(0,)), Evaluate(ema=True), Resume(0.001), Remake(1), Fail(1)),
    )
    assert eval(repr(program)) == program
    assert repr(Program()) == "Program()"


def _done(**values: torch.Tensor) -> Outcome:
    """A rank whose weights went where its optimizers have moved them."""
    zeros = {name: torch.zeros_like(value).double() for name, value in values.items()}
    return Outcome("done", tensors=values, trainable=tuple(values), drift=zeros, updates=dict(zeros))


@pytest.mark.parametrize(
    ("outcomes", "kind"),
    [
        ([Outcome("died"), Outcome("raised")], "a process died"),
        ([Outcome("stuck"), Outcome("raised")], "stuck"),
        ([Outcome("raised", is_typed=False), Outcome("raised")], "untyped error"),
        ([Outcome("raised", "CommunicationError: ..."), Outcome("done")], "some ranks succeed"),
        ([Outcome("raised", "CommunicationError: ...")] * 2, "communication fails"),
        ([Outcome("raised", "ValueError: ...")] * 2, None),
        ([Outcome("done")] * 2, None),
    ],
)
def test_failures_are_judged(outcomes, kind):
    """Catches a check that takes a crash or a failure of some ranks for a refusal."""
    wrong = checks.failure(Program(), outcomes)
    assert (wrong and wrong[0]) == kind


def test_results_are_judged():
    """Catches checks that see nothing."""
    program, one, other = Program("decentralized"), _done(w=torch.ones(2)), _done(w=torch.tensor([1.0, 1.0001]))
    assert checks.ranks_differ(program, [one, one]) is None
    assert checks.ranks_differ(program, [one, other])[0] == "ranks differ"
    assert checks.difference([one], [other], exact=True)
    assert not checks.difference([one], [other], exact=False)
    assert checks.not_finite(program, [_done(w=torch.tensor([float("nan")]))])
    moved = _done(w=torch.ones(2))
    moved.updates["w"] = torch.ones(2).double()
    assert checks.lost_steps(program, [one, one]) is None
    assert checks.lost_steps(program, [moved, moved])[0] == "steps are lost"


def test_what_is_kept_back_is_judged():
    """Catches a bound so wide that error feedback may lose anything."""
    program = Program(options={"codec": "int4"})
    exactly = _done(w=torch.zeros(1))
    exactly.applied, exactly.peaks = {"w": torch.tensor([10.0])}, {"w": 1.0}
    for lost, is_wrong in ((0.1, False), (1.0, True)):
        got = _done(w=torch.zeros(1))
        got.applied = {"w": torch.tensor([10.0 - lost])}
        assert bool(checks.kept_back(program, [got, got], [exactly, exactly])) == is_wrong


def test_stuck_and_dead_ranks_do_not_end_the_pool(pool):
    """Catches a pool that waits for ever, or that runs the next program on what is left of a failed one."""
    planned = Program(operations=(Train(), Fail(1)))
    assert [outcome.status for outcome in pool.run(planned)] == ["raised", "raised"]
    assert [outcome.status for outcome in pool.run(Program())] == ["done", "done"]
