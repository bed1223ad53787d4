"""Step 2: the program starts several processes on this machine. Comments mark the lines that are new.

python examples/steps/2_spawn.py --processes 2
"""

import argparse

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


def train_on(rank: int, args: argparse.Namespace) -> None:  # new: each process runs this
    accel.init_process_group("gloo", seed=0, rank=rank, world_size=args.processes, port=args.port)  # new: joins the others
    torch.set_num_threads(1)  # new: processes share the cores
    train, test = digits()
    loader = accel.get_dataloader(train, batch_size=64 // args.processes, shuffle=True)  # new: loads this rank's part of the data
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)

    with accel.wrap(model, optimizer, "bytegrad") as ddp:  # new: sends gradients at eight bits
        for _epoch in range(args.epochs):
            for images, labels in loader:
                optimizer.zero_grad()
                nn.functional.cross_entropy(ddp(images), labels).backward()
                optimizer.step()

        if rank == 0:  # new: all ranks hold the same weights, so one prints
            images, labels = test.tensors
            with torch.inference_mode():
                accuracy = (model(images).argmax(1) == labels).float().mean().item()
            print(f"test accuracy {accuracy:.1%}, {ddp.statistics.sent_bytes / 1e6:.1f} MB sent by each process")
    accel.destroy_process_group()  # new


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--port", type=int, default=29500, help="free port on this machine, for the rendezvous")
    args = parser.parse_args()
    torch.multiprocessing.spawn(train_on, (args,), nprocs=args.processes)  # new


if __name__ == "__main__":
    main()
