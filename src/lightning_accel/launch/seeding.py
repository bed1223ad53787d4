"""Seeds for the random generators of a program without Lightning."""

import random
import sys

import torch


def seed_everything(seed: int) -> None:
    """Seeds the generators of Python, torch and, where it has been imported, NumPy."""
    random.seed(seed)
    if (numpy := sys.modules.get("numpy")) is not None:
        numpy.random.seed(seed % 2**32)
    torch.manual_seed(seed)
