"""Runs programs for a given time, shrinks what it finds, and prints it: `make fuzz SECONDS=600`."""

from __future__ import annotations

import argparse
import time
from collections import Counter
from dataclasses import dataclass, field

import torch
from hypothesis import HealthCheck, Phase, given, seed, settings

from fuzz.checks import Finding, check
from fuzz.programs import ALGORITHMS, Program, programs
from fuzz.run import Pool

SHRINKING_SECONDS = 40.0
"""Time for making one program smaller."""


@dataclass
class Found:
    """What was found first, how small it became, and after what search; making programs smaller is none."""

    finding: Finding
    seconds: float
    programs: int
    seed: int
    seen: int = 1


class _Failing(AssertionError):
    """Raised in one place, so that hypothesis takes all failures for one; `Hunt` lets only one signature fail at a time."""


@dataclass
class Hunt:
    """A search, until its time is over.

    Args:
        pool: Runs the programs.
        seconds: Its time.
        ignores_known: Whether known defects are counted only.
    """

    pool: Pool
    seconds: float
    algorithms: tuple[str, ...] = ALGORITHMS
    ignores_known: bool = True
    kinds: Counter[str] = field(default_factory=Counter)
    found: dict[str, Found] = field(default_factory=dict)
    expected: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self._started = time.monotonic()
        self._cache: dict[str, list[Finding]] = {}
        self._shrinking: tuple[str, float] | None = None
        self._searched_programs = 0
        self._shrunk_seconds = 0.0

    def run(self, first_seed: int) -> None:
        """Searches, with one seed after the other."""
        number = first_seed
        while self._elapsed() < self.seconds:
            self._shrinking = None
            try:
                self._search(number)
            except _Failing:
                assert self._shrinking is not None
                self._shrunk_seconds += time.monotonic() - self._shrinking[1]
            number += 1

    def _search(self, number: int) -> None:
        @seed(number)
        @settings(
            max_examples=100,
            deadline=None,
            database=None,
            report_multiple_bugs=False,
            phases=[Phase.generate, Phase.shrink],
            suppress_health_check=list(HealthCheck),
        )
        @given(programs(self.algorithms))
        def run(program: Program) -> None:
            self._try(program, number)

        run()

    def _try(self, program: Program, number: int) -> None:
        key = repr(program)
        if key not in self._cache:
            if self._is_over():
                return
            self._cache[key] = check(program, self.pool)
            if self._shrinking is None:
                self._searched_programs += 1
                self.kinds[program.algorithm] += 1
                self.kinds.update(type(operation).__name__ for operation in program.operations)
        failing = [finding for finding in self._cache[key] if self._fails(finding, key, number)]
        if failing:
            raise _Failing

    def _fails(self, finding: Finding, key: str, number: int) -> bool:
        """Counts a finding; gives whether hypothesis is to make its program smaller."""
        signature = finding.known_as or f"{finding.kind}: {finding.program.algorithm}"
        if self._shrinking is not None:
            if signature == self._shrinking[0] and len(key) <= len(repr(self.found[signature].finding.program)):
                self.found[signature].finding = finding
            return signature == self._shrinking[0]
        if finding.known_as and self.ignores_known:
            self.expected[signature] += 1
        elif signature in self.found:
            self.found[signature].seen += 1
        else:
            self.found[signature] = Found(finding, self._elapsed() - self._shrunk_seconds, self._searched_programs, number)
            self._shrinking = signature, time.monotonic()
            return True
        return False

    def _elapsed(self) -> float:
        return time.monotonic() - self._started

    def _is_over(self) -> bool:
        if self._shrinking is not None:
            return time.monotonic() - self._shrinking[1] > SHRINKING_SECONDS
        return self._elapsed() > self.seconds

    def report(self) -> str:
        """What ran and what was found, as Python to paste into test_found.py."""
        searched = f"{self._searched_programs} programs in {self._elapsed() - self._shrunk_seconds:.0f} s of search"
        lines = [
            f"{searched}; {self.pool.programs} runs in {self._elapsed():.0f} s, with twins and shrinking",
            f"kinds: {dict(self.kinds.most_common())}",
        ]
        lines += [f"expected, {count} times: {reason}" for reason, count in self.expected.most_common()]
        for signature, found in self.found.items():
            lines.append(
                f"\nFOUND {signature}\nafter {found.seconds:.0f} s and {found.programs} programs, seed {found.seed}, seen "
                f"{found.seen} times\n    {found.finding.program!r},\n{found.finding.detail[:1500]}"
            )
        return "\n".join(lines)


def main() -> int:
    """Hunts, prints, and fails if anything was found."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--seed", type=int, default=0, help="first seed; the same seed makes the same programs")
    parser.add_argument("--algorithms", nargs="+", choices=ALGORITHMS, default=ALGORITHMS)
    parser.add_argument("--known", action="store_true", help="report known defects too")
    options = parser.parse_args()
    torch.set_num_threads(1)  # as on the ranks: sums of more threads have other bits
    with Pool() as pool:
        hunt = Hunt(pool, options.seconds, tuple(options.algorithms), ignores_known=not options.known)
        try:
            hunt.run(options.seed)
        finally:
            print(hunt.report(), flush=True)  # noqa: T201
    return 1 if hunt.found else 0


if __name__ == "__main__":
    raise SystemExit(main())
