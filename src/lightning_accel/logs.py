"""Loggers whose messages say that they are this package's, and of which rank."""

from __future__ import annotations

import logging
import sys


def get_log(name: str) -> logging.Logger:
    """Returns a module's logger; its messages begin with "lightning-accel, rank 0: ", or without a rank before ranks have met."""
    logger = logging.getLogger(name)
    logger.addFilter(_add_prefix)
    return logger


def _add_prefix(record: logging.LogRecord) -> bool:
    distributed = sys.modules.get("torch.distributed")
    has_rank = distributed is not None and distributed.is_available() and distributed.is_initialized()
    record.msg = f"lightning-accel{f', rank {distributed.get_rank()}' if has_rank else ''}: {record.msg}"  # type: ignore[union-attr]
    return True
