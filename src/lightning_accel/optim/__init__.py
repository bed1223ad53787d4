"""Optimizers that an algorithm works with."""

from lightning_accel.optim.qadam import Phase, QAdam, QAdamOptimizer

__all__ = ["Phase", "QAdam", "QAdamOptimizer"]
