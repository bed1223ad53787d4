"""Trains a small network on handwritten digits without Lightning. A run that was stopped resumes after its last whole epoch.

    torchrun --nproc-per-node 2 examples/plain_pytorch.py --checkpoint digits.pt
    torchrun --nproc-per-node 2 examples/plain_pytorch.py --algorithm gradient_allreduce

Under SLURM or Open MPI start it by `srun python ...` or `mpirun python ...`. Without a launcher it trains on one process.
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
    parser.add_argument("--algorithm", default="bytegrad", help="algorithm of communication (default: %(default)s)")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--checkpoint", type=Path, help="file to save after each epoch, and to resume from if it exists")
    accel.add_arguments(parser)
    args = parser.parse_args()

    accel.init_process_group(args.backend, seed=0, rank=args.rank, world_size=args.world_size, host=args.host, port=args.port)
    torch.set_num_threads(1)  # processes share the cores
    device = torch.device("cuda", accel.get_local_rank()) if torch.cuda.is_available() else torch.device("cpu")
    train, test = digits()
    loader = accel.get_dataloader(train, batch_size=64 // accel.get_world_size(), shuffle=True)
    network = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10)).to(device)
    optimizer = torch.optim.Adam(network.parameters(), lr=2e-3)
    say = accel.get_logger().info

    with accel.wrap(network, optimizer, args.algorithm) as model:
        first_epoch = 0
        if args.checkpoint is not None and args.checkpoint.exists():
            first_epoch = accel.load_checkpoint(args.checkpoint, model, optimizer)["epoch"]
            say("resuming after epoch %d", first_epoch)
        for epoch in range(first_epoch, args.epochs):
            loader.sampler.set_epoch(epoch)
            for images, labels in loader:
                optimizer.zero_grad()
                loss = nn.functional.cross_entropy(model(images.to(device)), labels.to(device))
                loss.backward()
                optimizer.step()
            if args.checkpoint is not None:
                accel.save_checkpoint(args.checkpoint, model, optimizer, epoch=epoch + 1)
        images, labels = test.tensors
        with torch.inference_mode():
            accuracy = (network(images.to(device)).argmax(1).cpu() == labels).float().mean().item()
        sent = model.statistics
        say("test accuracy %.2f %%, each rank sent %.1f MB", 100 * accuracy, sent.sent_bytes / 1e6)
        say("full precision would have taken %.1f MB", sent.full_precision_bytes / 1e6)
    accel.destroy_process_group()


if __name__ == "__main__":
    main()
