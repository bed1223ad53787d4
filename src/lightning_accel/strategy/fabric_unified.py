# mypy: disable-error-code="misc"
"""The strategy for `lightning.fabric`."""

from lightning.fabric.strategies.ddp import DDPStrategy
from lightning.fabric.strategies.launchers.multiprocessing import _MultiProcessingLauncher

from lightning_accel.strategy.fabric import FabricStrategy
from lightning_accel.strategy.launcher import FabricLauncher
from lightning_accel.strategy.options import show_keywords


class Launcher(FabricLauncher, _MultiProcessingLauncher):
    """Joins `FabricLauncher` to the launcher of `lightning.fabric`."""


@show_keywords
class AccelStrategy(FabricStrategy, DDPStrategy):
    """Joins `FabricStrategy` to the DDPStrategy of `lightning.fabric`; `help` shows the former's docstring and all keywords."""

    launcher_of_processes = Launcher
