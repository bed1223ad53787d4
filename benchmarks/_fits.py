"""Measures training steps: runs fits of Lightning's Trainer one after another, with strategies in turn.

`Settings` describe a run; `measure` starts its ranks and returns the step time of each fit. Run as a program, this file is one of
the ranks. All fits share two processes and one default process group, so that they differ in the strategy alone.
"""

from __future__ import annotations

import itertools
import json
import logging
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from _common import Ratio
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy
from torch import nn
from torch.utils.data import DataLoader

from lightning_accel import AccelStrategy


@dataclass(frozen=True)
class Model:
    """A chain of square linear layers and ReLU, trained with SGD on random batches."""

    name: str
    layers: int
    width: int
    batch_size: int

    @property
    def numel(self) -> int:
        return self.layers * self.width * (self.width + 1)

    def build(self) -> nn.Module:
        layers = [layer for _ in range(self.layers) for layer in (nn.Linear(self.width, self.width), nn.ReLU())]
        return nn.Sequential(*layers)


MODELS = {
    "small": Model("small", layers=3, width=128, batch_size=32),
    "large": Model("large", layers=4, width=2048, batch_size=4),
}

STRATEGIES: dict[str, dict[str, Any]] = {
    "ddp": {},
    "gradient_allreduce": {"algorithm": "gradient_allreduce"},
    "bytegrad": {"algorithm": "bytegrad"},
    "decentralized": {"algorithm": "decentralized"},
    "shift_one": {"algorithm": "decentralized", "peer_selection_mode": "shift_one"},
    "low_precision_decentralized": {"algorithm": "low_precision_decentralized"},
}
"""Strategies by name: Lightning's DDPStrategy, with which the others are compared, and arguments of AccelStrategy."""


@dataclass(frozen=True)
class Settings:
    """Describes a run of fits.

    Attributes:
        model: Name of a model, from `MODELS`.
        rounds: Number of rounds; a round fits each strategy once and, in the opposite order, once more: two pairs.
        steps: Number of steps of a fit.
        skipped_steps: Number of first steps that are not timed, because DDP rebuilds its buckets after the first step.
        strategies: Names of strategies, from `STRATEGIES`.
        ddp_options: Options of torch's DistributedDataParallel, the same for all strategies.
    """

    model: str
    rounds: int
    steps: int
    skipped_steps: int = 5
    strategies: Sequence[str] = tuple(STRATEGIES)
    ddp_options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Fit:
    """Cost of a step of one fit, as rank 0 measured it.

    Attributes:
        strategy: Name of the strategy.
        seconds: Median duration of the timed steps.
        exposed_seconds: Time for which training waited for communication; None for DDPStrategy, which does not count it.
        sent_bytes: Bytes that one rank sent; None for DDPStrategy.
    """

    strategy: str
    seconds: float
    exposed_seconds: float | None
    sent_bytes: float | None


@dataclass(frozen=True)
class Place:
    """Tells where a rank runs: a prefix for its command, and additional environment variables."""

    command_prefix: tuple[str, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)


def measure(settings: Settings, places: Sequence[Place], master_address: str, master_port: int, num_nodes: int) -> list[Fit]:
    """Starts one rank in each place, waits for all, and returns rank 0's fits in the order they ran.

    Raises:
        RuntimeError: A rank failed; the others are killed.
    """
    ranks_per_node = len(places) // num_nodes
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "fits.json")
        ranks: list[subprocess.Popen[bytes]] = []
        try:
            for rank, place in enumerate(places):
                environment = {
                    **os.environ,
                    "MASTER_ADDR": master_address,
                    "MASTER_PORT": str(master_port),
                    "NODE_RANK": str(rank // ranks_per_node),
                    "LOCAL_RANK": str(rank % ranks_per_node),
                    "OMP_NUM_THREADS": "1",
                    **place.environment,
                }
                job = json.dumps([asdict(settings), num_nodes, ranks_per_node, str(out)])
                ranks.append(subprocess.Popen([*place.command_prefix, sys.executable, __file__, job], env=environment))
            while any(rank.poll() is None for rank in ranks) and not any(rank.poll() for rank in ranks):
                time.sleep(0.1)
            if failed := [index for index, rank in enumerate(ranks) if rank.poll()]:
                raise RuntimeError(f"rank {failed[0]} of {len(ranks)} failed with status {ranks[failed[0]].returncode}")
            return [Fit(**fit) for fit in json.loads(out.read_text())]
        finally:
            for rank in ranks:
                rank.kill()
                rank.wait()


def ratios(fits: Sequence[Fit], strategy: str, to: str = "ddp") -> Ratio:
    """Returns the ratio of step times of two strategies; the k-th fit of one is paired with the k-th of the other."""
    seconds = {name: [fit.seconds for fit in fits if fit.strategy == name] for name in (strategy, to)}
    return Ratio.of([own / other for own, other in zip(seconds[strategy], seconds[to], strict=True)])


def summary(fits: Sequence[Fit]) -> list[dict[str, Any]]:
    """Returns a row for each strategy, with medians over its fits and its ratio to ddp."""
    rows = []
    for strategy in dict.fromkeys(fit.strategy for fit in fits):
        own = [fit for fit in fits if fit.strategy == strategy]
        row: dict[str, Any] = {"strategy": strategy, "step_seconds": statistics.median(fit.seconds for fit in own)}
        if strategy != "ddp":
            row["ratio_to_ddp"] = ratios(fits, strategy)
            row["times_as_fast_as_ddp"] = ratios(fits, "ddp", strategy)
            row["exposed_seconds"] = statistics.median(fit.exposed_seconds or 0.0 for fit in own)
            row["sent_bytes"] = statistics.median(fit.sent_bytes or 0.0 for fit in own)
        rows.append(row)
    return rows


SUMMARY_COLUMNS = ("strategy", "ms per step", "ratio to ddp", "speedup", "ms waited per step", "MB sent per step")


def summary_cells(row: dict[str, Any]) -> tuple[str, ...]:
    """Formats a row of `summary` for a table with `SUMMARY_COLUMNS`."""
    step = f"{row['step_seconds'] * 1e3:.2f}"
    if row["strategy"] == "ddp":
        return (row["strategy"], step, "1", "1", "", "")
    return (
        row["strategy"],
        step,
        f"{row['ratio_to_ddp']}",
        f"{row['times_as_fast_as_ddp']:.2f}",
        f"{row['exposed_seconds'] * 1e3:.2f}",
        f"{row['sent_bytes'] / 1e6:.2f}",
    )


class Chain(LightningModule):
    """Trains a model."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.network = model.build()

    def training_step(self, batch: torch.Tensor, index: int) -> torch.Tensor:
        return self.network(batch).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=1e-3)


class Clock(Callback):
    """Records the end of each step, so that the time between two ends covers the whole loop."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_train_batch_end(self, *_: Any) -> None:
        self.ends.append(time.perf_counter())


def _fit(strategy_name: str, settings: Settings, num_nodes: int, devices: int) -> Fit:
    model = MODELS[settings.model]

    options = {"process_group_backend": "gloo", **settings.ddp_options}
    strategy = DDPStrategy(**options) if strategy_name == "ddp" else AccelStrategy(**STRATEGIES[strategy_name], **options)
    clock = Clock()
    torch.manual_seed(0)
    trainer = Trainer(
        strategy=strategy,
        accelerator="cpu",
        devices=devices,
        num_nodes=num_nodes,
        max_epochs=1,
        callbacks=[clock],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    batches = [torch.randn(model.batch_size, model.width) for _ in range(4)]
    trainer.fit(Chain(model), DataLoader([batches[step % len(batches)] for step in range(settings.steps)], batch_size=None))

    ends = clock.ends[settings.skipped_steps :]
    seconds = statistics.median(after - before for before, after in itertools.pairwise(ends))
    if strategy_name == "ddp":
        return Fit(strategy_name, seconds, None, None)
    cost = strategy.statistics
    return Fit(strategy_name, seconds, cost.exposed_seconds / settings.steps, cost.sent_bytes / settings.steps)


def main() -> None:
    options, num_nodes, devices, out = json.loads(sys.argv[1])
    settings = Settings(**options)
    for root in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(root).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"lightning\.pytorch")
    warnings.filterwarnings("ignore", message=".*does not have many workers")
    torch.set_num_threads(1)

    fits = []
    for strategy in settings.strategies:  # a first fit of each warms the process up
        _fit(strategy, settings, num_nodes, devices)
    for round_index in range(settings.rounds):
        turn = round_index % len(settings.strategies)
        forward = settings.strategies[turn:] + settings.strategies[:turn]
        for strategy in (*forward, *reversed(forward)):
            fits.append(_fit(strategy, settings, num_nodes, devices))
    if os.environ["NODE_RANK"] == os.environ["LOCAL_RANK"] == "0":
        Path(out).write_text(json.dumps([asdict(fit) for fit in fits]))


if __name__ == "__main__":
    main()
