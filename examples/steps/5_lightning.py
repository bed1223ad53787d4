"""Step 5: the same with Lightning, which provides the loop, the snapshots and the processes on this machine.

python examples/steps/5_lightning.py --devices 2
On several machines, as in step 4: lightning-accel run ... examples/steps/5_lightning.py --devices 4 --nodes 2
"""

import argparse
from pathlib import Path

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


def digits() -> tuple[TensorDataset, TensorDataset]:
    """Loads 1797 images of 8 x 8 pixels; every third is held out for the test."""
    pixels, labels = load_digits(return_X_y=True)
    images, labels = torch.tensor(pixels, dtype=torch.float32) / 16, torch.tensor(labels)
    is_test = torch.arange(len(images)) % 3 == 0
    return TensorDataset(images[~is_test], labels[~is_test]), TensorDataset(images[is_test], labels[is_test])


class Digits(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.network = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))

    def training_step(self, batch: list[torch.Tensor], index: int) -> torch.Tensor:
        images, labels = batch
        return nn.functional.cross_entropy(self.network(images), labels)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=2e-3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--devices", type=int, default=2, help="processes on each machine")
    parser.add_argument("--nodes", type=int, default=1, help="number of machines")
    parser.add_argument("--folder", type=Path, default="digits_snapshots", help="folder that all machines share")
    args = parser.parse_args()

    seed_everything(0, verbose=False)
    torch.set_num_threads(1)
    train, test = digits()
    trainer = Trainer(
        strategy="accel_bytegrad",  # one word chooses the communication
        accelerator="cpu",
        devices=args.devices,
        num_nodes=args.nodes,
        max_epochs=args.epochs,
        callbacks=[ModelCheckpoint(args.folder, save_last=True)],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    model = Digits()
    loader = DataLoader(train, batch_size=64 // trainer.world_size, shuffle=True)
    last = args.folder / "last.ckpt"
    trainer.fit(model, loader, ckpt_path=last if last.exists() else None)

    if trainer.is_global_zero:
        images, labels = test.tensors
        with torch.inference_mode():
            accuracy = (model.network(images).argmax(1) == labels).float().mean().item()
        sent = trainer.strategy.statistics.sent_bytes
        print(f"test accuracy {accuracy:.1%}, {sent / 1e6:.1f} MB sent by each process")


if __name__ == "__main__":
    main()
