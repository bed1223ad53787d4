"""Shared parts of the benchmarks: paired runs and their statistics, the machine's description, arguments, result files."""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"

_RESAMPLES = 10_000

# In a file or a pipe the console is wide enough for every table.
console = Console(width=None if sys.stdout.isatty() else 120)


@dataclass(frozen=True)
class Ratio:
    """The median ratio of paired runs, with its bootstrap 95 % interval."""

    median: float
    low: float
    high: float
    pairs: int

    @classmethod
    def of(cls, ratios: Sequence[float]) -> Ratio:
        """Summarises one ratio per pair. The percentile bootstrap draws pairs with replacement, the same ones every time."""
        values = torch.tensor(ratios, dtype=torch.float64)
        generator = torch.Generator().manual_seed(0)
        drawn = values[torch.randint(len(values), (_RESAMPLES, len(values)), generator=generator)]
        # The median of an even number is the mean of the middle two; torch.median would take the lower one.
        medians = drawn.quantile(0.5, dim=1)
        low, high = medians.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
        return cls(statistics.median(ratios), low, high, len(ratios))

    def inverse(self) -> Ratio:
        """Returns the inverse ratio; for an even number of pairs the median is approximate."""
        return Ratio(1 / self.median, 1 / self.high, 1 / self.low, self.pairs)

    def __format__(self, digits: str) -> str:
        digits = digits or ".3f"
        return f"{self.median:{digits}} [{self.low:{digits}}, {self.high:{digits}}]"


@dataclass(frozen=True)
class Bar:
    """A claim of this project, its measured value, and whether it holds here."""

    claim: str
    measured: str
    holds: bool


def alternate(a: Callable[[], float], b: Callable[[], float], pairs: int) -> list[tuple[float, float]]:
    """Runs `a` and `b` in turn, `pairs` times, in the order A B B A, so that slow drift cancels out."""
    results = []
    for pair in range(pairs):
        if pair % 2 == 0:
            first = a()
            results.append((first, b()))
        else:
            second = b()
            results.append((a(), second))
    return results


def machine() -> dict[str, Any]:
    """Describes the machine and the software, without the machine's name."""
    import lightning
    from lightning_accel import _native

    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "lightning": lightning.__version__,
        "instruction_set": _native.instruction_set(),
        "load_average": os.getloadavg()[0],
    }


def commit() -> str | None:
    """Returns the commit of the tree, with "-dirty" if files differ; None outside a repository."""
    try:
        command = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
        return subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def parser(description: str | None) -> argparse.ArgumentParser:
    """Returns a parser with the arguments that all programs share."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--json", type=Path, metavar="PATH", help="file for the results (default: benchmarks/results/<program>.json)"
    )
    return parser


def save(args: argparse.Namespace, results: Any, bars: Sequence[Bar]) -> None:
    """Writes machine, commit, settings, results and claims to a JSON file."""
    name = Path(sys.argv[0]).stem
    path = args.json or RESULTS / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    settings = {key: value for key, value in vars(args).items() if key != "json"}
    record = {
        "program": name,
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": commit(),
        "machine": machine(),
        "settings": settings,
        "results": results,
        "bars": [asdict(bar) for bar in bars],
    }
    path.write_text(json.dumps(record, indent=2, default=_to_json) + "\n")
    console.print(f"written to {os.path.relpath(path)}")


def show(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Prints a table whose first column holds names and whose other columns hold numbers."""
    table = Table(title=title, title_justify="left")
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right")
    for row in rows:
        table.add_row(*row)
    console.print(table)


def show_bars(bars: Sequence[Bar]) -> None:
    """Prints each claim beside its measured value."""
    rows = [(bar.claim, bar.measured, "[green]holds[/]" if bar.holds else "[red]missed[/]") for bar in bars]
    show("Claims", ("claim", "measured", ""), rows)


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _to_json(value: Any) -> Any:
    return asdict(value) if isinstance(value, Ratio) else str(value)
