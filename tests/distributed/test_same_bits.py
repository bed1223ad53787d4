"""The same bits with other buckets, and after a resume, on three ranks, where a sum depends on its order."""

import pytest
import torch
from torch import nn

import lightning_accel as accel
from helpers.ranks import run_ranks
from helpers.tensors import CODECS, assert_same_bits

STEPS = 4
"""Of each half of a run."""


class Run:
    """A training run on this rank, made anew as after a start of the process."""

    def __init__(self, rank, algorithm, warmup_steps=1, **options):
        torch.manual_seed(3)
        self.rank = rank
        self.model = nn.Sequential(nn.Linear(20, 67), nn.Tanh(), nn.Linear(67, 33), nn.Tanh(), nn.Linear(33, 1))
        parameters = self.model.parameters()
        qadam = algorithm == "qadam"
        self.optimizer = accel.QAdam(parameters, 0.01, warmup_steps) if qadam else torch.optim.Adam(parameters, 0.01)
        self.ddp = accel.wrap(self.model, self.optimizer, algorithm, **options)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.ddp.replica.close()

    def train(self, first):
        for step in range(first, first + STEPS):
            self.optimizer.zero_grad()
            inputs = torch.randn(4, 20, generator=torch.Generator().manual_seed(10 * step + self.rank))
            (self.ddp(inputs) - inputs.sum(1, keepdim=True)).square().mean().backward()
            self.optimizer.step()

    def weights(self):
        return torch.cat([parameter.detach().flatten() for parameter in self.model.parameters()])


def compare(rank, world_size, folder, cases):
    for number, (algorithm, options) in enumerate(cases):
        path = f"{folder}/{number}.pt"
        with Run(rank, algorithm, bucket_cap_mb=0.003, **options) as whole:
            whole.train(0)
            accel.save_checkpoint(path, whole.ddp, whole.optimizer)
            whole.train(STEPS)
        # DDP has no buckets of its own yet at the first backward of a resumed run.
        with Run(rank, algorithm, bucket_cap_mb=0.003, **options) as resumed:
            accel.load_checkpoint(path, resumed.ddp, resumed.optimizer)
            resumed.train(STEPS)
        with Run(rank, algorithm, bucket_cap_mb=25, **options) as large:
            large.train(0)
            large.train(STEPS)
        assert_same_bits(resumed.weights(), whole.weights(), f"{algorithm}, {options}: resumed")
        assert_same_bits(large.weights(), whole.weights(), f"{algorithm}, {options}: large buckets")


CASES = {
    "bytegrad": [("bytegrad", {"codec": codec}) for codec in CODECS],
    "bytegrad with error feedback": [("bytegrad", {"codec": "int8", "error_feedback": True})],
    "qadam": [("qadam", {"warmup_steps": warmup_steps}) for warmup_steps in (2, 6, 100)],
    "qadam, momenta uncompressed": [("qadam", {"warmup_steps": 6, "codec": "none"})],
    "gradient_allreduce, hierarchical": [("gradient_allreduce", {"hierarchical": True})],
}
"""What promises it. qadam resumes after its warm-up, in it and across its end, and in it for good."""


@pytest.mark.parametrize("name", CASES)
def test_neither_buckets_nor_a_resume_change_a_bit(name, tmp_path):
    """Catches a sum whose order depends on an element's place in a bucket, as that of the backends' all_reduce does."""
    run_ranks(compare, 3, str(tmp_path), CASES[name])


def reduce_with(rank, world_size, bucket_cap_mb):
    with Run(rank, "gradient_allreduce", bucket_cap_mb=bucket_cap_mb) as run:
        run.train(0)
    return run.weights()


def test_two_ranks_have_one_order():
    """Catches a promise for two ranks that is too narrow, or broken: gradient_allreduce is DDP's own sum."""
    small, large = (run_ranks(reduce_with, 2, bucket_cap_mb)[0] for bucket_cap_mb in (0.003, 25))
    assert_same_bits(small, large)
