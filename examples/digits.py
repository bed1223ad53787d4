"""Trains a small network on handwritten digits on two processes, and shows how much they sent.

    python examples/digits.py
    python examples/digits.py --algorithm gradient_allreduce
    python examples/digits.py --codec bf16
    python examples/digits.py --algorithm decentralized --communication-interval 2
    python examples/digits.py --algorithm qadam --codec sign

The digits come with scikit-learn: 1797 images of 8 x 8 pixels. The program needs the extra `examples`.
"""

import argparse
import logging
import os
import time
import warnings

import torch
from lightning.fabric.utilities.warnings import PossibleUserWarning
from lightning.pytorch import LightningModule, Trainer, seed_everything
from rich.console import Console
from rich.table import Table
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_accel import AccelStrategy, QAdam


class Digits(LightningModule):
    def __init__(self, num_steps: int) -> None:
        super().__init__()
        self.num_steps = num_steps
        self.network = nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1),
            nn.BatchNorm2d(32),
            nn.ReLU(),
            nn.Conv2d(32, 64, 3, padding=1),
            nn.BatchNorm2d(64),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Dropout(0.5),
            nn.Linear(64 * 4 * 4, 128),
            nn.ReLU(),
            nn.Dropout(0.5),
            nn.Linear(128, 10),
        )

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.network(images)

    def training_step(self, batch: list[torch.Tensor], index: int) -> torch.Tensor:
        images, labels = batch
        return nn.functional.cross_entropy(self(images), labels)

    def configure_optimizers(self) -> dict:
        if self.trainer.strategy.algorithm.name == "qadam":
            optimizer = QAdam(self.parameters(), warmup_steps=self.num_steps // 3)
        else:
            optimizer = torch.optim.Adam(self.parameters())
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=4e-3, total_steps=self.num_steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def digits(seed: int) -> tuple[TensorDataset, TensorDataset]:
    """Splits the images by the seed: a third, with equal shares of all digits, is held out for the test."""
    pixels, labels = load_digits(return_X_y=True)
    images = torch.tensor(pixels, dtype=torch.float32).view(-1, 1, 8, 8) / 16
    train, test = train_test_split(range(len(images)), test_size=1 / 3, stratify=labels, random_state=seed)
    labels = torch.tensor(labels)
    return TensorDataset(images[train], labels[train]), TensorDataset(images[test], labels[test])


def be_quiet() -> None:
    for root in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(root).setLevel(logging.WARNING)
    # The images are in memory already, so they need no worker processes.
    warnings.filterwarnings("ignore", message=".*does not have many workers", category=PossibleUserWarning)
    # These concern Lightning and torch, not this program.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"lightning\.pytorch\.utilities")


def main() -> None:
    has_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--algorithm", default="bytegrad", help="algorithm of communication (default: %(default)s)")
    parser.add_argument("--codec", help="codec of the messages (default: the algorithm's)")
    parser.add_argument("--peer-selection-mode", help='peers of decentralized: "all" or "shift_one"')
    parser.add_argument("--communication-interval", type=int, help="rounds between two exchanges of weights")
    parser.add_argument("--devices", type=int, default=torch.cuda.device_count() if has_gpu else 2, help="GPUs or processes")
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--seed", type=int, default=0, help="seed of the split, the weights and the order of images")
    args = parser.parse_args()

    be_quiet()
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // args.devices))  # processes share the cores
    seed_everything(args.seed, verbose=False)

    train, test = digits(args.seed)
    loader = DataLoader(train, batch_size=64 // args.devices, shuffle=True)
    model = Digits(num_steps=args.epochs * -(-len(train) // 64))
    trainer = Trainer(
        strategy=AccelStrategy(
            algorithm=args.algorithm,
            codec=args.codec,
            peer_selection_mode=args.peer_selection_mode,
            communication_interval=args.communication_interval,
        ),
        accelerator="gpu" if has_gpu else "cpu",
        devices=args.devices,
        max_epochs=args.epochs,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
    )
    started = time.perf_counter()
    trainer.fit(model, loader)
    seconds = time.perf_counter() - started

    if trainer.is_global_zero:  # all ranks hold the same weights
        images, labels = test.tensors
        with torch.inference_mode():
            accuracy = (model.eval()(images).argmax(1) == labels).float().mean().item()
        sent = trainer.strategy.statistics
        table = Table(title=f"{args.algorithm} on {trainer.world_size} processes")
        for column in ("test accuracy", "seconds", "each rank sent", "in full precision"):
            table.add_column(column, justify="right")
        megabytes = (f"{count / 1e6:.1f} MB" for count in (sent.sent_bytes, sent.full_precision_bytes))
        table.add_row(f"{accuracy:.2%}", f"{seconds:.1f}", *megabytes)
        Console().print(table)


if __name__ == "__main__":
    main()
