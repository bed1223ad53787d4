"""Trains a small character-level GPT on Python's sources on two processes, with Adam or QAdam.

    python examples/gpt.py                               # Adam with mean gradients
    python examples/gpt.py --algorithm qadam             # QAdam: int8 momentum after warm-up
    python examples/gpt.py --algorithm qadam --codec sign

The program prints the loss on held-out files and how much each rank sent; docs/qadam.md has a table of results. The text is the
standard library of the Python that runs the program. It needs the extra `examples`.
"""

import argparse
import math
import os
import sysconfig
import time
import warnings
from pathlib import Path

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from rich.console import Console
from rich.table import Table
from torch import nn
from torch.utils.data import DataLoader, Dataset

from lightning_accel import AccelStrategy, QAdam

CONTEXT = 64  # characters
VOCABULARY = 128  # ASCII; all other characters become 0


def read_text(files: list[Path]) -> torch.Tensor:
    characters = torch.tensor(list(b"".join(file.read_bytes() for file in files)), dtype=torch.uint8)
    return torch.where(characters < VOCABULARY, characters, 0).long()


def sources() -> tuple[torch.Tensor, torch.Tensor]:
    """Reads the standard library's modules as text; every twentieth is held out for the test."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    return read_text([f for k, f in enumerate(files) if k % 20]), read_text(files[::20])


class Windows(Dataset):
    """`length` windows of the text at random places, which `seed` chooses, each with the characters that follow."""

    def __init__(self, text: torch.Tensor, length: int, seed: int) -> None:
        self.text = text
        generator = torch.Generator().manual_seed(seed)
        self.starts = torch.randint(len(text) - CONTEXT - 1, (length,), generator=generator)

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        window = self.text[self.starts[index] : self.starts[index] + CONTEXT + 1]
        return window[:-1], window[1:]


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.before_attention, self.before_mlp = nn.LayerNorm(width), nn.LayerNorm(width)
        self.queries_keys_values, self.output = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, width = x.shape
        parts = self.queries_keys_values(self.before_attention(x)).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        attended = nn.functional.scaled_dot_product_attention(*parts, is_causal=True)
        x = x + self.output(attended.transpose(1, 2).reshape(batch, length, width))
        return x + self.mlp(self.before_mlp(x))


class GPT(LightningModule):
    def __init__(self, steps: int, warmup_steps: int, lr: float = 1e-3, width: int = 192, heads: int = 6, depth: int = 7) -> None:
        super().__init__()
        self.steps, self.warmup_steps, self.lr = steps, warmup_steps, lr
        self.characters, self.places = nn.Embedding(VOCABULARY, width), nn.Embedding(CONTEXT, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(depth)))
        self.head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, VOCABULARY))
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.02)

    def loss(self, characters: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        x = self.characters(characters) + self.places(torch.arange(CONTEXT, device=characters.device))
        return nn.functional.cross_entropy(self.head(self.blocks(x)).flatten(0, 1), targets.flatten())

    def training_step(self, batch: list[torch.Tensor], index: int) -> torch.Tensor:
        return self.loss(*batch)

    def configure_optimizers(self) -> dict:
        if self.trainer.strategy.algorithm.name == "qadam":
            optimizer = QAdam(self.parameters(), lr=self.lr, warmup_steps=self.warmup_steps)
        else:
            optimizer = torch.optim.Adam(self.parameters(), lr=self.lr, fused=True)
        # The learning rate rises to its maximum long before the warm-up ends, then falls.
        rise = max(1, self.warmup_steps // 3)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: min((step + 1) / rise, 0.55 + 0.45 * math.cos(math.pi * step / self.steps))
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--algorithm", default="gradient_allreduce", help="algorithm of communication (default: %(default)s)")
    parser.add_argument("--codec", help="codec of the messages (default: the algorithm's)")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--warmup-steps", type=int, help="QAdam's warm-up steps (default: a quarter of the steps)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the weights and the order of the text")
    parser.add_argument("--devices", type=int, default=2, help="GPUs or processes")
    args = parser.parse_args()

    warnings.filterwarnings("ignore", message=".*does not have many workers")
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // args.devices))  # processes share the cores
    seed_everything(args.seed, verbose=False)
    train, test = sources()
    batch = 16 // args.devices
    loader = DataLoader(Windows(train, args.steps * 16, args.seed), batch_size=batch)
    model = GPT(args.steps, args.warmup_steps or args.steps // 4)
    trainer = Trainer(
        strategy=AccelStrategy(algorithm=args.algorithm, codec=args.codec),
        accelerator="gpu" if torch.cuda.is_available() else "cpu",
        devices=args.devices,
        max_steps=args.steps,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
    )
    started = time.perf_counter()
    trainer.fit(model, loader)
    seconds = time.perf_counter() - started

    if trainer.is_global_zero:  # all ranks hold the same weights
        held_out = DataLoader(Windows(test, 512, seed=0), batch_size=64)
        with torch.inference_mode():
            loss = sum(model.eval().loss(*windows).item() for windows in held_out) / len(held_out)
        sent = trainer.strategy.statistics
        numel = sum(parameter.numel() for parameter in model.parameters())
        table = Table(
            title=f"{args.algorithm} {args.codec or ''} on {trainer.world_size} processes, {numel / 1e6:.1f} M parameters"
        )
        for column in ("seed", "loss on held-out files", "seconds", "each rank sent", "in full precision"):
            table.add_column(column, justify="right")
        megabytes = (f"{count / 1e6:.0f} MB" for count in (sent.sent_bytes, sent.full_precision_bytes))
        table.add_row(str(args.seed), f"{loss:.4f}", f"{seconds:.0f}", *megabytes)
        Console().print(table)


if __name__ == "__main__":
    main()
