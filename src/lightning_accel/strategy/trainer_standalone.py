# mypy: disable-error-code="misc"
"""The strategy for `pytorch_lightning`."""

from pytorch_lightning.strategies import DDPStrategy

from lightning_accel.strategy.options import show_keywords
from lightning_accel.strategy.trainer import TrainerStrategy


@show_keywords
class AccelStrategy(TrainerStrategy, DDPStrategy):
    """Joins `TrainerStrategy` to the DDPStrategy of `pytorch_lightning`; `help` shows the former's docstring and all keywords."""
