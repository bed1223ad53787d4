"""Compares a training step of each algorithm with Lightning's DDPStrategy: two processes on one machine, gloo over loopback.

    python benchmarks/bench_step.py

Loopback is as fast as memory, so this shows the cost of the software on a fast network. Strategies take turns in one pair of
processes; a step is timed from the end of a batch to the end of the next.
"""

from __future__ import annotations

import socket
from dataclasses import asdict

from _common import Bar, parser, save, show, show_bars
from _fits import MODELS, STRATEGIES, SUMMARY_COLUMNS, Fit, Place, Settings, measure, ratios, summary, summary_cells


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS), help="models to train (default: all)")
    arguments.add_argument(
        "--strategies", nargs="+", choices=STRATEGIES, default=list(STRATEGIES), help="strategies, ddp first (default: all)"
    )
    arguments.add_argument("--rounds", type=int, default=12, help="rounds of fits, with two pairs each (default: %(default)s)")
    arguments.add_argument("--steps", type=int, default=35, help="steps of a fit (default: %(default)s)")
    args = arguments.parse_args()

    results = {}
    bars: list[Bar] = []
    for name in args.models:
        settings = Settings(name, args.rounds, args.steps, strategies=args.strategies)
        fits = measure(settings, [Place()] * 2, "127.0.0.1", free_port(), num_nodes=1)
        rows = summary(fits)
        model = MODELS[name]
        show(
            f"{name} model: {model.numel / 1e6:.2f} M parameters, batch size {model.batch_size}; 2 processes, loopback",
            SUMMARY_COLUMNS,
            [summary_cells(row) for row in rows],
        )
        results[name] = {"summary": rows, "fits": [asdict(fit) for fit in fits]}
        bars += compare_with_claims(name, fits)
    if bars:
        show_bars(bars)
    save(args, results, bars)


def compare_with_claims(model: str, fits: list[Fit]) -> list[Bar]:
    measured = {fit.strategy for fit in fits}
    bars = []
    if {"ddp", "gradient_allreduce"} <= measured:
        plain = ratios(fits, "gradient_allreduce")
        claim = f"{model}: gradient_allreduce takes at most 1.02 times as long as ddp (lower bound)"
        bars.append(Bar(claim, f"{plain}", plain.low <= 1.02))
    if {"ddp", "bytegrad"} <= measured and model == "large":
        fast = ratios(fits, "ddp", "bytegrad")
        bars.append(Bar(f"{model}: bytegrad is faster than ddp", f"{fast}", fast.low > 1))
    return bars


if __name__ == "__main__":
    main()
