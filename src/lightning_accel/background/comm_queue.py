"""Ordered queues of collectives."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from queue import SimpleQueue
from typing import Literal

import torch

from lightning_accel.background.failure import GRACE_SECONDS
from lightning_accel.transport.group import Group
from lightning_accel.transport.scratch import Scratch


class CommQueue:
    """One ordered sequence of collectives, with process groups and scratch memory that nothing else uses.

    Work in one queue runs in the order it was submitted; two queues run side by side.

    Attributes:
        groups: those it was opened with, by name.
        scratch: for the procedures run in this queue.
    """

    def __init__(self, name: str, groups: dict[str, Group], device: torch.device) -> None:
        self.groups = groups
        self.scratch = Scratch()
        self._device = device
        self._name = name
        self._queue: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._thread: threading.Thread | None = None
        self.stream: torch.cuda.Stream | None = None
        """Where the queue's work on a GPU is enqueued."""
        if device.type == "cuda":
            self.stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    @property
    def group(self) -> Group:
        """All ranks."""
        return self.groups["all"]

    @property
    def intra_node(self) -> Group:
        """Ranks on this node."""
        return self.groups["intra_node"]

    @property
    def inter_node(self) -> Group:
        """Ranks of equal local rank, one a node."""
        return self.groups["inter_node"]

    def enqueue(self, run: Callable[[], None]) -> None:
        """Lets the queue's thread run it, after what was enqueued before."""
        if self._thread is None:
            arguments = self._queue, self._device
            self._thread = threading.Thread(target=_work, args=arguments, name=f"lightning_accel {self._name}", daemon=True)
            self._thread.start()
        self._queue.put(run)

    def end(self) -> None:
        """Lets the thread end after what was enqueued."""
        self._queue.put(None)

    def close(self) -> bool:
        """Ends the thread; False if it did not end within a bound."""
        thread, self._thread = self._thread, None
        if thread is None:
            return True
        self.end()
        thread.join(GRACE_SECONDS)
        return not thread.is_alive()


def _work(works: SimpleQueue[Callable[[], None] | None], device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.set_device(device)
    while (run := works.get()) is not None:
        run()
        del run  # it holds the communicator, which may be dropped while this waits for the next


QueueGroups = Literal["all", "nodes", "none"]


Stage = tuple[CommQueue, Callable[[], None]]
"""A procedure, and the queue it runs in."""


def end_threads(queues: list[CommQueue]) -> None:
    """Lets the queues' threads end after what was enqueued."""
    for queue in queues:
        queue.end()


@contextlib.contextmanager
def on_stream(
    queue: CommQueue, tensor: torch.Tensor, ready: torch.cuda.Event | None
) -> Iterator[Callable[[], torch.cuda.Event | None]]:
    """On a GPU: what happens inside is enqueued on the queue's stream, after `ready`; gives a way to mark its end."""
    if queue.stream is None or ready is None:
        yield lambda: None
        return
    with torch.cuda.stream(queue.stream):
        queue.stream.wait_event(ready)
        tensor.record_stream(queue.stream)
        yield queue.stream.record_event
