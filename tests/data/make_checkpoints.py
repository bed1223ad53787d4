"""Makes the checkpoints of this folder: `python make_checkpoints.py FOLDER`, with the version that shall write them.

Two runs on two ranks, each with a state of its own on every rank. Each run is saved, resumed from what was saved, and trained on;
what it ends with is recorded. Nothing after the save may depend on the machine: gradients are given, products are exact, and the
rest is this package's arithmetic, which has the same bits everywhere.
"""

import argparse
import hashlib
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import lightning_accel as accel

WORLD_SIZE = 2
SIZES = (530, 33, 1)
"""More than a block of 512 elements, an odd number, and one."""
STEPS = 4
"""Before the save, and again after the resume."""
WARMUP_STEPS = 2
KEY = "lightning_accel"
COMPARED = ("state_dict", "optimizer_states", "lr_schedulers", "epoch", "global_step", "model", "optimizers", "extra", KEY)
"""Entries of a checkpoint that have to be equal; the others are Lightning's own."""
FORMAT = ("version", "layouts", "rank_files", "ranks")
"""Entries of our part that say how the checkpoint is written, not what was trained."""


def gradients_of(rank: int, step: int) -> list[torch.Tensor]:
    """Multiples of 12 in few bits: sums and means of two are exact. A part comes from the rank's own random generators."""
    generator = torch.Generator().manual_seed(100 * step + rank)
    parts = [torch.randint(-50, 51, (numel,), generator=generator) for numel in SIZES]
    noise = [torch.randint(-3, 4, (numel,)) + random.randint(-1, 1) for numel in SIZES]
    return [12 * (part + drawn).float() * 2.0**-12 for part, drawn in zip(parts, noise, strict=True)]


class Model(torch.nn.Module):
    """Parameters whose gradients are given: d/dw sum(w g) = g, to the bit."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(5)
        self.weights = torch.nn.ParameterList([torch.randn(numel, generator=generator) for numel in SIZES])

    def forward(self, gradients: list[torch.Tensor]) -> torch.Tensor:
        return torch.stack([(weight * gradient).sum() for weight, gradient in zip(self.weights, gradients, strict=True)]).sum()


# bytegrad with int4 in a Lightning Trainer: residuals on each rank, momentum in the optimizer.


def fit(folder: Path, resume_from: Path | None = None, plugins: tuple = ()) -> Path:
    """Trains two epochs, from the start or from a checkpoint, and saves. Returns the checkpoint's path."""
    import lightning.pytorch as pl

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = Model()

        def on_fit_start(self) -> None:
            if resume_from is None:
                seed(self.global_rank)

        def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
            return self.model(gradients_of(self.global_rank, self.global_step))

        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.SGD(self.parameters(), lr=0.5, momentum=0.5)  # powers of two: products are exact
            return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)]

    epochs_before = 0 if resume_from is None else 2
    trainer = pl.Trainer(
        strategy=accel.AccelStrategy(algorithm="bytegrad", codec="int4"),
        accelerator="cpu",
        devices=WORLD_SIZE,
        max_epochs=epochs_before + 2,
        plugins=list(plugins),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    data = torch.utils.data.DataLoader(range(WORLD_SIZE * STEPS // 2))
    trainer.fit(Module(), data, ckpt_path=resume_from and str(resume_from))
    path = folder / ("last.ckpt" if resume_from is None else "trained.ckpt")
    trainer.save_checkpoint(path)
    return path


# qadam with int4 in a plain loop: residuals on each rank, the optimizer past its warm-up.


def train(folder: Path, resume_from: Path | None = None) -> Path:
    """Trains some steps, from the start or from a checkpoint, and saves. Needs a process group; returns the checkpoint's path."""
    rank = torch.distributed.get_rank()
    if resume_from is None:
        seed(rank)
    model = Model()
    optimizer = accel.QAdam(model.parameters(), lr=0.01, warmup_steps=WARMUP_STEPS)
    with accel.wrap(model, optimizer, "qadam", codec="int4") as ddp:
        first = 0
        if resume_from is not None:
            first = accel.load_checkpoint(resume_from, ddp, optimizer)["step"]
            accel.save_checkpoint(folder / "restored.pt", ddp, optimizer, step=first)
        for step in range(first, first + STEPS):
            optimizer.zero_grad()
            ddp(gradients_of(rank, step)).backward()
            optimizer.step()
        path = folder / ("last.pt" if resume_from is None else "trained.pt")
        accel.save_checkpoint(path, ddp, optimizer, step=first + STEPS, rank_files="inside")
    return path


# What a checkpoint holds, in a form that can be compared.


def contents(path: Path) -> dict[str, Any]:
    """What a checkpoint holds for all ranks and for each, wherever its format keeps it; generators' states as digests."""
    checkpoint = torch.load(path, weights_only=True)
    checkpoint = {name: checkpoint[name] for name in COMPARED if name in checkpoint}
    part = checkpoint[KEY] = {name: value for name, value in checkpoint[KEY].items() if name not in FORMAT}
    part["generators"] = [{name: digest(state[name]) for name in ("python", "torch")} for state in part["generators"]]
    ranks = [{name: rank[name] for name in ("replicas", "entries")} for rank in states_of_ranks(path)]
    return {"checkpoint": checkpoint, "ranks": ranks}


def states_of_ranks(path: Path) -> list[dict[str, Any]]:
    """What each rank held for itself, from its file or from inside the checkpoint."""
    part = torch.load(path, weights_only=True)[KEY]
    if part["rank_files"] is None:
        return part["ranks"]
    folder = Path(f"{path}.ranks") / part["rank_files"]
    return [torch.load(file, weights_only=True) for file in sorted(folder.iterdir())]


def digest(state: Any) -> str:
    data = state.numpy().tobytes() if isinstance(state, torch.Tensor) else repr(state).encode()
    return hashlib.sha256(data).hexdigest()


def seed(rank: int) -> None:
    random.seed(rank)
    torch.manual_seed(rank)


def make(folder: Path, run: Callable[..., Path]) -> None:
    """On each rank: a checkpoint, and what the run ends with that resumes from it."""
    saved = run(folder)
    trained = run(folder, saved)
    torch.distributed.barrier()
    if torch.distributed.get_rank() == 0:
        torch.save(contents(trained), folder / "trained")
        for left in (trained, *folder.glob("restored.pt")):
            left.unlink()
            shutil.rmtree(f"{left}.ranks", ignore_errors=True)
    torch.distributed.barrier()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("run", choices=["lightning", "plain"], nargs="?", help="this is one of its ranks; default: start both")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.run == "lightning":
        make(arguments.folder / "lightning", fit)
    elif arguments.run == "plain":
        accel.init_process_group(backend="gloo")
        make(arguments.folder / "plain", train)
        accel.destroy_process_group()
    else:
        torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(WORLD_SIZE)]
        for run, launcher in (("lightning", []), ("plain", torchrun)):
            (arguments.folder / run).mkdir(parents=True, exist_ok=True)
            subprocess.run([sys.executable, *launcher, __file__, str(arguments.folder), run], check=True)


if __name__ == "__main__":
    main()
