"""SIGTERM on all ranks without a wait at every batch: see docs/design/0006-sigterm.md."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from lightning_accel.algorithms import BoundAlgorithm
from lightning_accel.logs import get_log

_log = get_log(__name__)


class SigtermRelay:
    """Replaces Lightning's broadcasts of a SIGTERM, in one Trainer and for one fit.

    Lightning waits for rank 0 at each batch to learn whether it got the signal, and once more inside the handler. Here the
    algorithm's own messages carry the news, from any rank. All ranks then meet in a consensus and stop there, so that
    callbacks save one model on the way out.

    Args:
        trainer: Trainer whose loop and signal handler are replaced, on the instances alone.
        algorithm: Algorithm with `relays_termination`.
        reach_consensus: Function that makes weights equal and then calls `stop_if_terminating`. Collective.

    Attributes:
        is_possible: Whether this Lightning has such broadcasts; if not, nothing was replaced.
    """

    def __init__(self, trainer: Any, algorithm: BoundAlgorithm, reach_consensus: Callable[[], None]) -> None:
        self._trainer = trainer
        self._algorithm = algorithm
        self._reach_consensus = reach_consensus
        self._has_received = False
        loop, connector = trainer.fit_loop.epoch_loop, trainer._signal_connector
        self._exception = getattr(sys.modules[type(loop).__module__], "SIGTERMException", None)
        self._replaced = [(loop, "_broadcast_sigterm_tensor"), (connector, "_sigterm_notifier_fn")]
        self.is_possible = self._exception is not None and all(hasattr(owner, name) for owner, name in self._replaced)
        if self.is_possible:
            loop._broadcast_sigterm_tensor = self._before_batch
            connector._sigterm_notifier_fn = self._on_signal

    def stop_if_terminating(self) -> None:
        """Raises Lightning's SIGTERMException if a rank got the signal; after a consensus all ranks raise it, or none."""
        if self.is_possible and self._algorithm.is_terminating:
            assert self._exception is not None
            self._trainer._signal_connector.received_sigterm = True
            raise self._exception

    def end(self) -> None:
        """Puts Lightning's own methods back."""
        for owner, name in self._replaced:
            vars(owner).pop(name, None)

    def _on_signal(self, signum: int, frame: Any) -> None:
        _log.info("rank %d received signal %d: all ranks will save and stop", self._trainer.global_rank, signum)
        launcher = self._trainer.strategy.launcher
        if not self._has_received and launcher is not None:
            launcher.kill(signum)  # as Lightning does: to the processes that this one has started
        self._has_received = True
        self._algorithm.request_termination()

    def _before_batch(self) -> None:
        if self._algorithm.is_in_lockstep:
            # Ranks wait for each other in this batch anyway, and one that stopped at another batch would be waited for.
            is_terminating = self._trainer.strategy.reduce_boolean_decision(self._has_received, all=False)
        else:
            is_terminating = self._algorithm.is_terminating
        if is_terminating:
            self._reach_consensus()
