"""Averaging weights that lie on a GPU, through pinned memory on the host: the same bits as by the reference."""

from pathlib import Path

import pytest
import torch

from helpers.ranks import _load, run_ranks

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU"),
]

on_cpu = _load("async_on_cpu", str(Path(__file__).parents[1] / "distributed" / "test_async.py"))


def test_every_rank_equals_the_reference():
    """Catches a host buffer that is read or written while the GPU still copies, and copies that go the wrong way.

    Both ranks share a GPU, with gloo as DDP's backend: NCCL wants one for each.
    """
    for averagings, spread in run_ranks(on_cpu.follow_schedule, 2, "cuda"):
        assert averagings == sum(event == ("average",) for event in on_cpu.SCHEDULE)
        assert spread == [0.0] * 4
