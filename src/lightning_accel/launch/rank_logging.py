"""Loggers that print on selected ranks."""

from __future__ import annotations

import logging
import sys
from collections.abc import Collection

from lightning_accel.launch.process_group import get_rank


def get_logger(name: str = "lightning_accel", ranks: Collection[int] | None = (0,)) -> logging.Logger:
    """Returns a logger that prints on selected ranks, each line with its rank. Warnings and errors print on every rank.

    Args:
        name: Name of the logger; the first call for a name sets it up, later calls return it unchanged.
        ranks: Ranks that print; None selects all.
    """
    logger = logging.getLogger(name)
    if not any(isinstance(item, _RankFilter) for handler in logger.handlers for item in handler.filters):
        handler = logging.StreamHandler(sys.stdout)
        handler.setFormatter(logging.Formatter("[rank %(rank)s] %(message)s"))
        handler.addFilter(_RankFilter(ranks))  # on the handler: a logger's own filters do not see its children's records
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
        logger.propagate = False
    return logger


class _RankFilter(logging.Filter):
    """Adds the rank to each record, and passes the records of selected ranks."""

    def __init__(self, ranks: Collection[int] | None) -> None:
        super().__init__()
        self._ranks = ranks

    def filter(self, record: logging.LogRecord) -> bool:
        try:
            rank = get_rank()
        except ValueError:  # a message must not fail because launcher variables are incomplete
            rank = -1
        record.__dict__["rank"] = rank if rank >= 0 else "?"
        return self._ranks is None or rank in self._ranks or record.levelno >= logging.WARNING
