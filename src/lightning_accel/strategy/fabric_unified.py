# mypy: disable-error-code="misc"
"""The strategy for `lightning.fabric`."""

from lightning.fabric.strategies.ddp import DDPStrategy

from lightning_accel.strategy.fabric import FabricStrategy
from lightning_accel.strategy.options import show_keywords


@show_keywords
class AccelStrategy(FabricStrategy, DDPStrategy):
    """Joins `FabricStrategy` to the DDPStrategy of `lightning.fabric`; `help` shows the former's docstring and all keywords."""
