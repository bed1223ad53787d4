"""Training runs of a plain PyTorch loop that are saved and resumed, and whether they are equal to the bit."""

import logging
import os
import random

import torch
from torch import nn

import lightning_accel as accel
from helpers import drifting  # noqa: F401 - registers the algorithm
from helpers.tensors import assert_same_bits

STEPS = 3


class Run:
    """A training run on this rank, made anew as after a start of the process, and different from every other."""

    def __init__(self, rank, algorithm="drifting"):
        random.seed(os.urandom(8))
        torch.seed()
        self.rank = rank
        model = nn.Sequential(nn.Linear(5, 7), nn.Dropout(0.5), nn.Linear(7, 2))
        self.optimizer = (
            accel.QAdam(model.parameters(), lr=0.01, warmup_steps=2)
            if algorithm == "qadam"
            else torch.optim.Adam(model.parameters(), lr=0.01)
        )
        self.ddp = accel.wrap(model, self.optimizer, algorithm)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.ddp.replica.close()

    def train(self, steps=STEPS):
        for _ in range(steps):
            self.optimizer.zero_grad()
            noise = random.random()
            batch = torch.randn(4, 5, generator=torch.Generator().manual_seed(self.ddp.replica.rounds))
            (self.ddp(batch + self.rank).square().mean() * (1 + noise)).backward()
            self.optimizer.step()

    def save(self, path, **extra):
        accel.save_checkpoint(path, self.ddp, self.optimizer, **extra)

    def load(self, path, **options):
        return accel.load_checkpoint(path, self.ddp, self.optimizer, **options)

    def everything(self):
        """All that a run depends on, as tensors by name."""
        replica = self.ddp.replica
        found = {f"weight {name}": weight.detach() for name, weight in self.ddp.module.named_parameters()}
        for place, state in self.optimizer.state_dict()["state"].items():
            found |= {f"optimizer {place} {name}": torch.as_tensor(value) for name, value in state.items()}
        for kind, residuals in replica.algorithm.rank_state_dict().items():
            found |= {f"residual {kind} {place}": residual for place, residual in enumerate(residuals)}
        found["counters"] = torch.tensor([replica.rounds, getattr(replica.algorithm, "steps", 0)])
        found["torch"] = torch.get_rng_state()
        found["python"] = torch.tensor(random.getstate()[1])
        return {name: value.clone() for name, value in found.items()}


def assert_same(actual, expected):
    assert actual.keys() == expected.keys()
    for name in actual:
        assert_same_bits(actual[name], expected[name], name)


def differ(one, other):
    """Names of what differs between two ranks or runs."""
    return {name.split()[0] for name in one.keys() & other.keys() if not torch.equal(one[name], other[name])}


def heard_by(logger="lightning_accel.checkpoint"):
    """A list that fills with what is logged, without the prefix."""
    heard = []
    handler = logging.Handler()
    handler.emit = lambda record: heard.append(record.getMessage().partition(": ")[2])
    logging.getLogger(logger).addHandler(handler)
    return heard
