"""Compares QAdam's step in each phase with torch.optim.Adam(fused=True) on the same parameters.

    python benchmarks/bench_optimizer.py

The optimizers take turns in one process, on one thread and on all cores.
"""

from __future__ import annotations

import os
import time
import warnings

import torch
from _common import Bar, Ratio, alternate, parser, save, show, show_bars

from lightning_accel import QAdam
from lightning_accel.optim import Phase


def parameters(numel: int, count: int) -> list[torch.nn.Parameter]:
    tensors = [torch.nn.Parameter(torch.randn(numel // count)) for _ in range(count)]
    for parameter in tensors:
        parameter.grad = torch.randn(numel // count) * 1e-3
    return tensors


def qadam(tensors: list[torch.nn.Parameter], phase: Phase) -> QAdam:
    optimizer = QAdam(tensors, warmup_steps=10**9)
    optimizer.attach()
    optimizer.step()
    if phase is Phase.COMPRESSED:
        optimizer.freeze()
    return optimizer


def seconds(optimizer: torch.optim.Optimizer) -> float:
    if isinstance(optimizer, QAdam):  # the algorithm does so in backward, where gradients become momentum
        optimizer.note_folded(optimizer.param_groups[0]["params"])
    started = time.perf_counter()
    optimizer.step()
    return time.perf_counter() - started


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--numel", type=int, default=32 << 20, help="total number of elements (default: 32 Mi)")
    arguments.add_argument("--count", type=int, default=64, help="number of parameters (default: %(default)s)")
    arguments.add_argument("--pairs", type=int, default=20, help="pairs of runs (default: %(default)s)")
    args = arguments.parse_args()
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    adam = torch.optim.Adam(parameters(args.numel, args.count), fused=True)
    rows, results, bars = [], [], []
    for threads in sorted({1, os.cpu_count() or 1}):
        torch.set_num_threads(threads)
        for phase in Phase:
            optimizer = qadam(parameters(args.numel, args.count), phase)
            seconds(optimizer), seconds(adam)
            timed = alternate(lambda o=optimizer: seconds(o), lambda: seconds(adam), args.pairs)
            ratio = Ratio.of([own / other for own, other in timed])
            ours = sorted(own for own, _ in timed)[len(timed) // 2]
            rows.append([f"{phase.value}, {threads} threads", f"{ours * 1e3:.1f} ms", f"{ratio:.2f}"])
            results.append({"phase": phase.value, "threads": threads, "seconds": ours, "ratio_to_adam": ratio})
            bars.append(
                Bar(f"{phase.value}, {threads} threads: takes no longer than Adam(fused=True)", f"{ratio:.2f}", ratio.low <= 1.0)
            )
    show("QAdam's step", ("phase", "time", "ratio to Adam(fused=True)"), rows)
    show_bars(bars)
    save(args, results, bars)


if __name__ == "__main__":
    main()
