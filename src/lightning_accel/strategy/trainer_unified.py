# mypy: disable-error-code="misc"
"""The strategy for `lightning.pytorch`."""

from lightning.pytorch.strategies import DDPStrategy

from lightning_accel.strategy.options import show_keywords
from lightning_accel.strategy.trainer import TrainerStrategy


@show_keywords
class AccelStrategy(TrainerStrategy, DDPStrategy):
    """Joins `TrainerStrategy` to the DDPStrategy of `lightning.pytorch`; `help` shows the former's docstring and all keywords."""
