# mypy: disable-error-code="misc"
"""The strategy for `pytorch_lightning`."""

from pytorch_lightning.strategies import DDPStrategy
from pytorch_lightning.strategies.launchers import _MultiProcessingLauncher

from lightning_accel.strategy.launcher import TrainerLauncher
from lightning_accel.strategy.options import show_keywords
from lightning_accel.strategy.trainer import TrainerStrategy


class Launcher(TrainerLauncher, _MultiProcessingLauncher):
    """Joins `TrainerLauncher` to the launcher of `pytorch_lightning`."""


@show_keywords
class AccelStrategy(TrainerStrategy, DDPStrategy):
    """Joins `TrainerStrategy` to the DDPStrategy of `pytorch_lightning`; `help` shows the former's docstring and all keywords."""

    launcher_of_processes = Launcher
