"""Programs that the hunter has found, made small: a defect's last trace. Paste what it prints."""

import pytest

from fuzz.checks import check
from fuzz.programs import Evaluate, ExtraRound, Fail, Model, Optimizer, Program, Remake, Resume, Train  # noqa: F401 - to paste
from fuzz.run import Pool

FOUND: list[Program] = []


@pytest.fixture(scope="module")
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
