"""Checks that are made for NCCL, on the CPU: streams are threads there, and what is about memory and streams passes by itself."""

from pathlib import Path

from helpers.ranks import load_module
from helpers.sequences import failures_of

nccl = load_module("nccl_on_cpu", str(Path(__file__).parents[1] / "cuda" / "test_nccl_cuda.py"))


def test_on_the_cpu():
    """Catches stages of a bucket that run in another order than given, buckets that share memory, and checks that have fallen
    behind what they check, which would be noticed only where there is a GPU."""
    assert failures_of(nccl.run, nccl.CHECKS, 1, "cpu", timeout=60) == {}
