"""Step 2: several processes of this machine, started by the program itself. New are the lines marked so.

python examples/steps/2_spawn.py --processes 2
"""

import argparse

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import TensorDataset

import lightning_accel as accel


def digits() -> tuple[TensorDataset, TensorDataset]:
    """1797 images of 8 x 8 pixels; every third is kept for the test."""
    pixels, labels = load_digits(return_X_y=True)
    images, labels = torch.tensor(pixels, dtype=torch.float32) / 16, torch.tensor(labels)
    is_test = torch.arange(len(images)) % 3 == 0
    return TensorDataset(images[~is_test], labels[~is_test]), TensorDataset(images[is_test], labels[is_test])


def train_on(rank: int, args: argparse.Namespace) -> None:  # new: what each process runs
    accel.init_process_group("gloo", seed=0, rank=rank, world_size=args.processes, port=args.port)  # new: it joins the others
    torch.set_num_threads(1)  # new: processes share the cores
    train, test = digits()
    loader = accel.get_dataloader(train, batch_size=64 // args.processes, shuffle=True)  # new: its part of the data
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)

    with accel.wrap(model, optimizer, "bytegrad") as ddp:  # new: gradients travel, at eight bits
        for _epoch in range(args.epochs):
            for images, labels in loader:
                optimizer.zero_grad()
                nn.functional.cross_entropy(ddp(images), labels).backward()
                optimizer.step()

        if rank == 0:  # new: all hold the same weights, one prints
            images, labels = test.tensors
            with torch.inference_mode():
                accuracy = (model(images).argmax(1) == labels).float().mean().item()
            print(f"test accuracy {accuracy:.1%}, {ddp.statistics.sent_bytes / 1e6:.1f} MB sent by each process")
    accel.destroy_process_group()  # new


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--port", type=int, default=29500, help="of this machine, where the processes meet")
    args = parser.parse_args()
    torch.multiprocessing.spawn(train_on, (args,), nprocs=args.processes)  # new


if __name__ == "__main__":
    main()
