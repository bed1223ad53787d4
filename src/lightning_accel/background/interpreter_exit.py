"""Communication that nobody has closed is closed at the interpreter's exit.

A thread that comes out of a native call after it would end the process by force.
"""

from __future__ import annotations

import atexit
import os
import weakref
from typing import Protocol


class Closable(Protocol):
    """Something with `close`, which waits a bounded time and never raises."""

    def close(self) -> None:
        """Ends it."""


_open: weakref.WeakKeyDictionary[Closable, int] = weakref.WeakKeyDictionary()
"""What is to be closed, with the process that made it."""


def close_at_exit(closable: Closable) -> None:
    """Closes it at the interpreter's exit, if it is still there."""
    if not _open:
        atexit.unregister(_close_all)
        atexit.register(_close_all)
    _open[closable] = os.getpid()


def _close_all() -> None:
    for closable, process_id in list(_open.items()):
        if process_id == os.getpid():  # a forked process has neither threads nor connections of its own
            closable.close()
