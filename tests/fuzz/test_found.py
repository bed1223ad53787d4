"""Programs that the hunter has found, made small. Paste what it prints."""

import pytest

from fuzz.checks import check
from fuzz.programs import ExtraRound, Fail, Model, Optimizer, Program, Remake, Resume, Train
from fuzz.run import Pool

INT4 = {"codec": "int4"}
TWO_PARTS = (Optimizer(parts=(0,)), Optimizer(parts=(1,)))
PARTLY_TOLD = (Optimizer(parts=(0,)), Optimizer(parts=(1,), told=False))

FOUND = [
    Program("decentralized", operations=(Remake(), Train())),
    Program("decentralized", optimizers=PARTLY_TOLD, operations=(Train(times=2, toggled=True),)),
    Program("decentralized", model=Model(teacher=True)),
    Program("low_precision_decentralized", model=Model(teacher=True)),
    Program("async", model=Model(teacher=True)),
    Program("decentralized", model=Model(growing=True)),
    Program(options=INT4, optimizers=TWO_PARTS, operations=(Train(times=12, toggled=True),)),
    Program(options=INT4, optimizers=PARTLY_TOLD, operations=(Train(times=30),)),
    Program(options=INT4, operations=(Train(), Remake(), Train(times=30))),
    Program(options=INT4, model=Model(widths=(33, 33)), operations=(Train(times=30, backwards=3),)),
    Program("gradient_allreduce", ranks=3, model=Model(widths=(33, 33, 7)), operations=(Train(2), Resume(), Train(2))),
    Program(
        "qadam", ranks=3, model=Model((33, 33, 7)), optimizers=(Optimizer("qadam"),), operations=(Train(), Resume(), Train())
    ),
    Program("low_precision_decentralized", ranks=3, operations=(Train(), ExtraRound(1))),
    Program("decentralized", operations=(Fail(1), Train())),
]


@pytest.fixture
def pool():
    with Pool() as ranks:
        yield ranks


@pytest.mark.parametrize("program", FOUND, ids=repr)
def test_found(program, pool):
    """Catches the return of what was found once."""
    findings = check(program, pool)
    open_ones = {finding.known_as for finding in findings if finding.known_as}
    unexpected = [f"{finding.kind}: {finding.detail}" for finding in findings if not finding.known_as]
    assert not unexpected, "\n".join(unexpected)
    if open_ones:
        pytest.xfail("; ".join(sorted(open_ones)))
