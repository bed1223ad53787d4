# mypy: disable-error-code="misc"
"""Lightning's launchers of spawned and forked processes, without their base class, so that they serve each Lightning root."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from lightning_accel.strategy.advice import respell

if TYPE_CHECKING:
    # Either root's _MultiProcessingLauncher.
    _Base = Any
else:
    _Base = object

_STATISTICS = "lightning_accel.statistics"


class FabricLauncher(_Base):
    """Starts processes as Lightning does, by spawn, fork or forkserver."""

    def launch(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Runs a function in each process.

        Raises:
            RuntimeError: In a process that imports a script which starts processes without a guard. Lightning's advice would be
                `strategy="ddp"`.
        """
        if self._start_method == "spawn" and getattr(multiprocessing.current_process(), "_inheriting", False):
            raise RuntimeError(
                "a process that starts by 'spawn' imports the script, and starts processes in its turn: put what trains under "
                f'`if __name__ == "__main__":`, or write strategy={respell(self._strategy, {}, "")}'
            )
        return super().launch(function, *args, **kwargs)


class TrainerLauncher(FabricLauncher):
    """Brings what communication cost rank 0 to the process that has started the ranks."""

    def get_extra_results(self, trainer: Any) -> dict[str, Any]:
        """Returns what a rank sends to the process that has started it."""
        return {**super().get_extra_results(trainer), _STATISTICS: trainer.strategy.statistics}

    def update_main_process_results(self, trainer: Any, extra: dict[str, Any]) -> None:
        """Takes what rank 0 has sent."""
        trainer.strategy.statistics = extra.pop(_STATISTICS)
        super().update_main_process_results(trainer, extra)
