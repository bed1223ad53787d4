# mypy: disable-error-code="misc"
"""The strategy for `lightning.pytorch`."""

from lightning.pytorch.strategies import DDPStrategy

from lightning_accel.strategy.trainer import AccelMixin


class AccelStrategy(AccelMixin, DDPStrategy):  # noqa: D101 - the mixin's is shown
    __doc__ = AccelMixin.__doc__
