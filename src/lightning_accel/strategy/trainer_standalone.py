# mypy: disable-error-code="misc"
"""The strategy for `pytorch_lightning`."""

from pytorch_lightning.strategies import DDPStrategy

from lightning_accel.strategy.trainer import AccelMixin


class AccelStrategy(AccelMixin, DDPStrategy):  # noqa: D101 - the mixin's is shown
    __doc__ = AccelMixin.__doc__
