# mypy: disable-error-code="misc"
"""The strategy for `lightning.pytorch`."""

from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher

from lightning_accel.strategy.launcher import TrainerLauncher
from lightning_accel.strategy.options import show_keywords
from lightning_accel.strategy.trainer import TrainerStrategy


class Launcher(TrainerLauncher, _MultiProcessingLauncher):
    """Joins `TrainerLauncher` to the launcher of `lightning.pytorch`."""


@show_keywords
class AccelStrategy(TrainerStrategy, DDPStrategy):
    """Joins `TrainerStrategy` to the DDPStrategy of `lightning.pytorch`; `help` shows the former's docstring and all keywords."""

    launcher_of_processes = Launcher
