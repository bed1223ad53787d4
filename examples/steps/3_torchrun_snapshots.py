"""Step 3: torchrun starts the processes, and restarts all when one dies; training resumes from the last snapshot.

lightning-accel run --nproc-per-node 2 --max-restarts 3 examples/steps/3_torchrun_snapshots.py --snapshot digits.pt

Kill one of the processes (kill -9) to see it. Comments mark the lines that are new since step 2.
"""

import argparse
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import TensorDataset

import lightning_accel as accel


def digits() -> tuple[TensorDataset, TensorDataset]:
    """Loads 1797 images of 8 x 8 pixels; every third is held out for the test."""
    pixels, labels = load_digits(return_X_y=True)
    images, labels = torch.tensor(pixels, dtype=torch.float32) / 16, torch.tensor(labels)
    is_test = torch.arange(len(images)) % 3 == 0
    return TensorDataset(images[~is_test], labels[~is_test]), TensorDataset(images[is_test], labels[is_test])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--snapshot", type=Path, default="digits.pt")  # new
    args = parser.parse_args()

    accel.init_process_group("gloo", seed=0)  # new: torchrun's variables tell the ranks
    torch.set_num_threads(1)
    say = accel.get_logger().info  # new: prints on rank 0
    train, test = digits()
    loader = accel.get_dataloader(train, batch_size=64 // accel.get_world_size(), shuffle=True)
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)

    with accel.wrap(model, optimizer, "bytegrad") as ddp:
        first_epoch = 0
        if args.snapshot.exists():  # new: weights, optimizer, the algorithm's state and the epoch
            first_epoch = accel.load_checkpoint(args.snapshot, ddp, optimizer)["epoch"]
            say("resuming after epoch %d", first_epoch)
        loader.sampler.set_epoch(first_epoch)  # new: gives images the order of an undisturbed run
        for epoch in range(first_epoch, args.epochs):
            for images, labels in loader:
                optimizer.zero_grad()
                nn.functional.cross_entropy(ddp(images), labels).backward()
                optimizer.step()
            accel.save_checkpoint(args.snapshot, ddp, optimizer, epoch=epoch + 1)  # new: replaces the old snapshot when complete

        images, labels = test.tensors
        with torch.inference_mode():
            accuracy = (model(images).argmax(1) == labels).float().mean().item()
        say(f"test accuracy {accuracy:.1%}, {ddp.statistics.sent_bytes / 1e6:.1f} MB sent by each process")
    accel.destroy_process_group()


if __name__ == "__main__":
    main()
