# mypy: disable-error-code="misc"
"""The strategy for `lightning.fabric`."""

from lightning.fabric.strategies.ddp import DDPStrategy

from lightning_accel.strategy.fabric import FabricAccelMixin


class AccelStrategy(FabricAccelMixin, DDPStrategy):  # noqa: D101 - the mixin's is shown
    __doc__ = FabricAccelMixin.__doc__
