"""Step 4: several machines, here two, with the same files on both and a shared folder for the snapshot. Run one line on each:

lightning-accel run --nnodes 2 --node-rank 0 --master-addr node0 --nproc-per-node 4 examples/steps/4_several_nodes.py
lightning-accel run --nnodes 2 --node-rank 1 --master-addr node0 --nproc-per-node 4 examples/steps/4_several_nodes.py

Or from one of them: lightning-accel ssh-run --host-list node0,node1 --nproc-per-node 4 examples/steps/4_several_nodes.py
Or by a scheduler: examples/slurm.sbatch, examples/openmpi.sh. Comments mark the lines that are new since step 3.
"""

import argparse
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import TensorDataset

import lightning_accel as accel


def prepare(file: Path) -> None:  # new: runs once on each machine, as a download would
    if accel.get_local_rank() == 0:
        pixels, labels = load_digits(return_X_y=True)
        torch.save((torch.tensor(pixels, dtype=torch.float32) / 16, torch.tensor(labels)), file)
    dist.barrier()


def digits(file: Path) -> tuple[TensorDataset, TensorDataset]:
    """Loads 1797 images of 8 x 8 pixels; every third is held out for the test."""
    images, labels = torch.load(file, weights_only=True)
    is_test = torch.arange(len(images)) % 3 == 0
    return TensorDataset(images[~is_test], labels[~is_test]), TensorDataset(images[is_test], labels[is_test])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--snapshot", type=Path, default="digits.pt", help="file that all machines share")
    parser.add_argument("--data", type=Path, default=Path(tempfile.gettempdir(), "digits_data.pt"), help="local data file")  # new
    args = parser.parse_args()

    found = accel.init_process_group("gloo", seed=0)
    if accel.get_local_rank() == 0:  # new: prints the ranks of each machine, and the variables they come from
        print(found, flush=True)
    torch.set_num_threads(1)
    say = accel.get_logger().info
    prepare(args.data)  # new
    train, test = digits(args.data)
    loader = accel.get_dataloader(train, batch_size=64 // accel.get_world_size(), shuffle=True)
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)

    # new: "auto", the default, sums gradients in full precision inside a machine, and sends them compressed between machines
    with accel.wrap(model, optimizer, "bytegrad", hierarchical="auto") as ddp:
        first_epoch = accel.load_checkpoint(args.snapshot, ddp, optimizer)["epoch"] if args.snapshot.exists() else 0
        loader.sampler.set_epoch(first_epoch)
        for epoch in range(first_epoch, args.epochs):
            for images, labels in loader:
                optimizer.zero_grad()
                nn.functional.cross_entropy(ddp(images), labels).backward()
                optimizer.step()
            accel.save_checkpoint(args.snapshot, ddp, optimizer, epoch=epoch + 1)

        images, labels = test.tensors
        with torch.inference_mode():
            accuracy = (model(images).argmax(1) == labels).float().mean().item()
        say(f"test accuracy {accuracy:.1%}, {ddp.statistics.sent_bytes / 1e6:.1f} MB sent by each process")
    accel.destroy_process_group()


if __name__ == "__main__":
    main()
