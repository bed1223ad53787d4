"""Scripts that set torch's default device or dtype."""

import torch
from torch import nn

import lightning_accel as accel
from helpers.ranks import run_ranks
from helpers.tensors import assert_same_bits

ALGORITHMS = {
    "gradient_allreduce": {"hierarchical": True},
    "bytegrad": {"codec": "int4"},
    "qadam": {"codec": "int4"},
    "decentralized": {},
    "low_precision_decentralized": {},
    "async": {"sync_interval_ms": 1, "warmup_steps": 2},
}

DEFAULTS = [("cpu", torch.float64), ("cpu", torch.bfloat16), ("meta", torch.float32)]
"""Devices and dtypes; a tensor of ours that followed the first into "meta" would have no values."""


def train(rank, algorithm, default_device, default_dtype):
    generator = torch.Generator().manual_seed(rank)
    inputs = torch.randn(6, 4, 700, generator=generator)
    torch.manual_seed(1)
    layers = nn.Linear(700, 5), nn.Tanh(), nn.Linear(5, 2)
    model = nn.Sequential(*layers)
    qadam = algorithm == "qadam"
    # Adam itself follows the defaults unless it is fused.
    optimizer = accel.QAdam(model.parameters(), 0.01, 3, fused=True) if qadam else torch.optim.SGD(model.parameters(), 0.1)
    torch.set_default_device(default_device)
    torch.set_default_dtype(default_dtype)
    try:
        with accel.wrap(model, optimizer, algorithm, **ALGORITHMS[algorithm]) as ddp:
            for batch in inputs:
                optimizer.zero_grad()
                ddp(batch).square().mean().backward()
                optimizer.step()
    finally:
        torch.set_default_device("cpu")
        torch.set_default_dtype(torch.float32)
    return [parameter.detach().clone() for parameter in model.parameters()]


def compare(rank, world_size):
    for algorithm in ALGORITHMS:
        expected = train(rank, algorithm, "cpu", torch.float32)
        for device, dtype in DEFAULTS:
            for one, other in zip(train(rank, algorithm, device, dtype), expected, strict=True):
                assert one.isfinite().all(), (algorithm, device, dtype)
                if algorithm != "async":  # its averaging depends on time
                    assert_same_bits(one, other, f"{algorithm}, default {device} and {dtype}")


def test_nothing_follows_the_defaults():
    """Catches residuals, messages or votes of the dtype, or on the device, that a script has made the default."""
    run_ranks(compare, 2)
