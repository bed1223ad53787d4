"""Ordered queues of collectives, and the steps that run in them."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Literal

import torch

from lightning_accel.background.failure import GRACE_SECONDS
from lightning_accel.transport.group import Group
from lightning_accel.transport.scratch import Scratch

QueueGroups = Literal["all", "nodes", "none"]
"""Groups a queue has: of all ranks, of this node and of its peers on other nodes, or none."""


class CommQueue:
    """One ordered sequence of collectives, with process groups and scratch memory that nothing else uses.

    Steps in one queue run in the order they were submitted; two queues run side by side.

    Args:
        name: Name of its thread, and in events.
        groups: Groups by name: "all", or "intra_node" and "inter_node".
        device: Device of the tensors.

    Attributes:
        name: See above.
        scratch: Memory for the collectives run in this queue.
        stream: Where its work on a GPU is enqueued; None on the CPU.
    """

    def __init__(self, name: str, groups: dict[str, Group], device: torch.device) -> None:
        self.name = name
        self.scratch = Scratch()
        self.stream: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self.stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._groups = groups
        self._device = device
        self._waiting: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()
        self._reported_bytes = 0

    @property
    def group(self) -> Group:
        """All ranks."""
        return self._groups["all"]

    @property
    def intra_node(self) -> Group:
        """Ranks on this node."""
        return self._groups["intra_node"]

    @property
    def inter_node(self) -> Group:
        """Ranks of equal local rank, one a node."""
        return self._groups["inter_node"]

    def take_sent_bytes(self) -> int:
        """Returns the bytes this rank has sent in this queue since the last call."""
        with self._lock:
            total = sum(group.sent_bytes for group in self._groups.values())
            taken, self._reported_bytes = total - self._reported_bytes, total
        return taken

    def enqueue(self, run: Callable[[], None]) -> None:
        """Lets the queue's thread run it, after what was enqueued before."""
        if self._thread is None:
            arguments = self._waiting, self._device
            self._thread = threading.Thread(target=_work, args=arguments, name=f"lightning_accel {self.name}", daemon=True)
            self._thread.start()
        self._waiting.put(run)

    @contextlib.contextmanager
    def on_stream(self, tensor: torch.Tensor, ready: torch.cuda.Event | None) -> Iterator[Callable[[], torch.cuda.Event | None]]:
        """Enqueues what happens inside on the queue's stream, after `ready`, on a GPU; gives a way to mark its end."""
        if self.stream is None or ready is None:
            yield lambda: None
            return
        with torch.cuda.stream(self.stream):
            self.stream.wait_event(ready)
            tensor.record_stream(self.stream)
            yield self.stream.record_event

    def end(self) -> None:
        """Lets the thread end after what was enqueued."""
        self._waiting.put(None)

    def close(self) -> bool:
        """Ends the thread; returns False if it did not end within a bound."""
        thread, self._thread = self._thread, None
        if thread is None:
            return True
        self.end()
        thread.join(GRACE_SECONDS)
        return not thread.is_alive()


@dataclass(frozen=True)
class Step:
    """A part of a tensor's communication.

    Attributes:
        name: What it does, such as "encode".
        queue: Where it runs.
        run: Does it; starts messages in groups of that queue only.
        waits: Whether it waits for other ranks. A first step that does not may run on the training thread.
    """

    name: str
    queue: CommQueue
    run: Callable[[], object]
    waits: bool = True


def _work(waiting: SimpleQueue[Callable[[], None] | None], device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.set_device(device)
    while (run := waiting.get()) is not None:
        run()
        del run  # it holds the communicator, which may be dropped while this waits for the next
