"""Loggers that print on some ranks."""

from __future__ import annotations

import logging
import sys
from collections.abc import Collection
from typing import TYPE_CHECKING

from lightning_accel.launch.process_group import get_rank

if TYPE_CHECKING:
    pass


def get_logger(name: str = "lightning_accel", ranks: Collection[int] | None = (0,)) -> logging.Logger:
    """A logger that prints on some ranks only, each line with its rank. Warnings and errors are printed everywhere.

    Args:
        name: of the logger; each name is set up once.
        ranks: that print; None means all.
    """
    logger = logging.getLogger(name)
    if not any(isinstance(item, _ForRanks) for handler in logger.handlers for item in handler.filters):
        handler = logging.StreamHandler(sys.stdout)
        handler.setFormatter(logging.Formatter("[rank %(rank)s] %(message)s"))
        handler.addFilter(_ForRanks(ranks))  # of the handler: a logger's own do not see its children's records
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
        logger.propagate = False
    return logger


class _ForRanks(logging.Filter):
    """Adds the rank to records, and lets those of some ranks pass."""

    def __init__(self, ranks: Collection[int] | None) -> None:
        super().__init__()
        self._ranks = ranks

    def filter(self, record: logging.LogRecord) -> bool:
        try:
            rank = get_rank()
        except ValueError:  # a message must not fail because variables are incomplete
            rank = -1
        record.__dict__["rank"] = rank if rank >= 0 else "?"
        return self._ranks is None or rank in self._ranks or record.levelno >= logging.WARNING
