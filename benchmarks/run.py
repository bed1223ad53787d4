"""Runs all benchmarks that need no GPU, one after another, and writes their tables as Markdown.

    sudo .venv/bin/python benchmarks/run.py
    python benchmarks/run.py --quick          # minutes instead of an hour: shows that everything works, gives no figures to quote

Without root's rights the program skips bench_link.py, and says so. Results and summary.md go to benchmarks/results/.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from _common import RESULTS, console

PROGRAMS = {
    "bench_codecs": ["--numel", str(4 << 20), "--pairs", "4"],
    "bench_step": ["--rounds", "2", "--steps", "15"],
    "bench_link": ["--rounds", "1", "--steps", "12"],
}
"""Programs, each with the arguments that make it quick."""


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--quick", action="store_true", help="few repetitions")
    arguments.add_argument("--results", type=Path, default=RESULTS, help="folder for the results (default: benchmarks/results)")
    args = arguments.parse_args()
    args.results.mkdir(parents=True, exist_ok=True)

    failed = []
    records = []
    for name, quick in PROGRAMS.items():
        if name == "bench_link" and os.geteuid() != 0:
            console.print("skipping bench_link.py: it needs root's rights")
            continue
        path = args.results / f"{name}.json"
        command = [
            sys.executable,
            str(Path(__file__).with_name(f"{name}.py")),
            "--json",
            str(path),
            *(quick if args.quick else []),
        ]
        if subprocess.run(command, check=False).returncode != 0:
            failed.append(name)
        else:
            records.append(json.loads(path.read_text()))
    summary = args.results / "summary.md"
    summary.write_text("\n\n".join(markdown(record) for record in records) + "\n")
    console.print(f"wrote the tables to {os.path.relpath(summary)}")
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


def markdown(record: dict[str, Any]) -> str:
    """Formats a program's record as Markdown."""
    settings = ", ".join(f"{key} {value}" for key, value in record["settings"].items())
    host = record["machine"]
    parts = [
        f"## {record['program']}",
        f"{record['time']}, commit {record['commit']}; {host['cores']} cores of {host['cpu']} ({host['instruction_set']}), "
        f"torch {host['torch']}, Lightning {host['lightning']}; final load average {host['load_average']:.1f}; {settings}.",
        *_tables(record["program"], record["results"]),
    ]
    if record["bars"]:
        rows = [[bar["claim"], bar["measured"], "holds" if bar["holds"] else "missed"] for bar in record["bars"]]
        parts.append(_table(["claim", "measured", ""], rows))
    return "\n\n".join(parts)


def _tables(program: str, results: dict[str, Any]) -> list[str]:
    if program == "bench_codecs":
        names = list(dict.fromkeys(row["operation"] for row in results["to_memcpy"]))
        by_codec: dict[str, list[str]] = {}
        for row in results["to_memcpy"]:
            by_codec.setdefault(f"{row['codec']}, {row['dtype']}", []).append(_ratio(row["to_memcpy"]))
        to_torch = [[f"int8 {name}", _ratio(ratio)] for name, ratio in results["int8_to_torch"].items()]
        return [
            f"memcpy moves {results['memcpy_gigabytes_per_second']:.1f} GB/s. Bytes moved per second, as a ratio to memcpy's:",
            _table(["codec, dtype", *names], [[codec, *ratios] for codec, ratios in by_codec.items()]),
            "Speedup over torch operations:",
            _table(["operation", "speedup"], to_torch),
        ]
    if program == "bench_step":
        return [part for model, result in results.items() for part in (f"Model: {model}.", _steps(result["summary"]))]
    there, back = results["both_ways_bits_per_second"]
    return [
        f"The link carries {results['one_way_bits_per_second'] / 1e6:.0f} Mbit/s one way, {there / 1e6:.0f} and "
        f"{back / 1e6:.0f} both ways at once (TCP {results['congestion_control']}).",
        _steps(results["summary"]),
    ]


def _steps(rows: list[dict[str, Any]]) -> str:
    cells = []
    for row in rows:
        own = [row["strategy"], f"{row['step_seconds'] * 1e3:.1f} ms"]
        if "ratio_to_ddp" in row:
            own += [_ratio(row["ratio_to_ddp"], 3), _ratio(row["times_as_fast_as_ddp"])]
            own += [f"{row['exposed_seconds'] * 1e3:.1f} ms", f"{row['sent_bytes'] / 1e6:.2f} MB"]
        cells.append(own + [""] * (6 - len(own)))
    return _table(["strategy", "step", "ratio to ddp", "speedup", "waited per step", "sent per step"], cells)


def _ratio(ratio: dict[str, Any], digits: int = 2) -> str:
    return f"{ratio['median']:.{digits}f} [{ratio['low']:.{digits}f}, {ratio['high']:.{digits}f}]"


def _table(columns: list[str], rows: list[list[str]]) -> str:
    lines = [columns, ["---", *["---:"] * (len(columns) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    main()
