"""Communication in the background: own process groups, one order on all ranks, counters, and failures that end training.

On the CPU, and where gloo carries CUDA tensors, a daemon thread runs what is submitted, in the order of submission. On NCCL no
Python thread issues work: what is submitted is enqueued at once, on a side stream.

The first failure poisons a communicator for good. A collective that one rank missed would let its peers pair later ones up
wrongly and train on with wrong gradients, so nothing more is issued, everything pending and later fails with it, and the
groups' connections are closed, which makes the peers fail within moments instead of at their timeout.
"""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.constants import default_pg_timeout

from lightning_accel.collectives import Group, Scratch, backend_of
from lightning_accel.topology import Topology

_log = logging.getLogger(__name__)

_GRACE_SECONDS = 5.0
"""What a wait allows beyond the group's timeout, so that the backend's own, more telling error comes first."""

_POLL_SECONDS = 0.2
"""How often a waiting thread looks up, so that Ctrl-C is heard."""


class CommunicationError(RuntimeError):
    """Background communication failed on this rank or, as seen from it, on another; training cannot go on.

    Its cause (`__cause__`) is the first error.
    """


@dataclass
class Statistics:
    """What communication cost this rank so far.

    Attributes:
        sent_bytes: bytes sent to other ranks.
        full_precision_bytes: bytes that an uncompressed ring all_reduce of the same tensors sends.
        communication_seconds: spent in communication, most of it beside backward.
        exposed_seconds: the training thread's share of that: it waited.
    """

    sent_bytes: int = 0
    full_precision_bytes: int = 0
    communication_seconds: float = 0.0
    exposed_seconds: float = 0.0


class _Task:
    """One tensor's communication: `future` delivers the tensor once it is overwritten, or as it is after a failure."""

    def __init__(self, label: str, tensor: torch.Tensor) -> None:
        self.label = label
        self.tensor = tensor
        self.future: torch.futures.Future[torch.Tensor] = torch.futures.Future(
            devices=[tensor.device] if tensor.is_cuda else None
        )
        self.started = time.perf_counter()

    def deliver(self) -> torch.futures.Future[torch.Tensor]:
        self.future.set_result(self.tensor)
        return self.future


class Communicator:
    """Runs one replica's communication. Collective: all ranks of `process_group` make it, close it, and submit alike.

    Args:
        name: the algorithm's, for messages.
        process_group: whose ranks take part; None is the default group. It carries nothing of ours: groups of our own do.
        device: of the tensors.
        timeout: of a collective; None takes the default of the backend.
        topology: ranks by node, for the groups `node` and `peers`.
    """

    def __init__(
        self,
        name: str,
        process_group: dist.ProcessGroup | None,
        device: torch.device,
        timeout: timedelta | None,
        topology: Topology,
    ) -> None:
        self._name = name
        parent = process_group if process_group is not None else dist.group.WORLD
        assert parent is not None, "torch.distributed has no default process group"
        self._parent = parent
        self._device = device
        self._timeout = timeout
        self._topology = topology
        self.rank = dist.get_rank(self._parent)
        self.world_size = dist.get_world_size(self._parent)
        self._owned: list[dist.ProcessGroup] = []
        self.group = self._new_group(tuple(range(self.world_size)))
        self._node: Group | None = None
        self._peers: Group | None = None
        self.scratch = Scratch()
        self._full_precision_bytes = 0
        self._direct_bytes = 0
        self._communication_seconds = 0.0
        self._exposed_seconds = 0.0

        self._changed = threading.Condition()
        self._pending: list[_Task] = []
        self._failure: CommunicationError | None = None

        backend = backend_of(self._parent, device)
        self._stream: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._uses_thread = device.type == "cpu" or backend == "gloo"
        self._queue: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    @property
    def node(self) -> Group:
        """Ranks on this node."""
        if self._node is None:
            raise RuntimeError("groups of nodes were not made; call connect_nodes() first, on all ranks")
        return self._node

    @property
    def peers(self) -> Group:
        """Ranks of equal local rank, one a node."""
        if self._peers is None:
            raise RuntimeError("groups of nodes were not made; call connect_nodes() first, on all ranks")
        return self._peers

    def connect_nodes(self) -> None:
        """Makes the groups `node` and `peers`. Collective."""
        self._node = self._new_group(self._topology.node_of(self.rank))
        self._peers = self._new_group(self._topology.peers_of(self.rank))

    @property
    def topology(self) -> Topology:
        """Ranks by node."""
        return self._topology

    @property
    def statistics(self) -> Statistics:
        """Counters since the start."""
        groups = [group for group in (self.group, self._node, self._peers) if group is not None]
        return Statistics(
            sent_bytes=self._direct_bytes + sum(group.sent_bytes for group in groups),
            full_precision_bytes=self._full_precision_bytes,
            communication_seconds=self._communication_seconds,
            exposed_seconds=self._exposed_seconds,
        )

    def submit(self, label: str, tensor: torch.Tensor, procedure: Callable[[], None]) -> torch.futures.Future[torch.Tensor]:
        """Runs `procedure`, which overwrites `tensor`, in the background; submitted in the same order on all ranks.

        Args:
            label: what this is, for messages, such as "bucket 3".
            tensor: what the future delivers; where communication failed, with its local value, and `wait` raises.
            procedure: communicates with `self.group`, `node`, `peers` and `self.scratch` only.
        """
        self._full_precision_bytes += self._ring_bytes(tensor)
        task = _Task(label, tensor)
        if not self._begin(task):
            return task.deliver()
        if self._stream is None:
            self._enqueue(lambda: self._run(task, procedure))
            return task.future
        ready = torch.cuda.current_stream(self._device).record_event()
        tensor.record_stream(self._stream)
        if self._uses_thread:
            self._enqueue(lambda: self._run_on_stream(task, procedure, ready))
        else:
            self._run_on_stream(task, procedure, ready)
        return task.future

    def all_reduce(self, label: str, tensor: torch.Tensor) -> torch.futures.Future[torch.Tensor]:
        """Sums `tensor` over all ranks in the background, by the backend's own all_reduce: no thread of ours between.

        Arguments and failures as in `submit`.
        """
        self._full_precision_bytes += self._ring_bytes(tensor)
        self._direct_bytes += self._ring_bytes(tensor)
        task = _Task(label, tensor)
        if not self._begin(task):
            return task.deliver()

        def finish(done: torch.futures.Future[list[torch.Tensor]]) -> None:
            try:
                done.value()
            except Exception as error:
                self._fail(error, label)
            self._finish(task)

        try:
            work = dist.all_reduce(tensor, group=self.group.process_group, async_op=True)
            assert work is not None
            work.get_future().add_done_callback(finish)
        except Exception as error:
            self._fail(error, label)
        return task.future

    def wait(self) -> None:
        """Waits, within bounds, for all that was submitted, and counts the time.

        The bound is the groups' timeout and some grace, from the last progress on. On NCCL there is nothing to wait for:
        streams order what follows.

        Raises:
            CommunicationError: if anything failed, now or before.
        """
        started = progress = time.perf_counter()
        limit = (self._timeout or default_pg_timeout).total_seconds() + _GRACE_SECONDS
        with self._changed:
            first = None
            while self._pending and self._uses_thread:
                now = time.perf_counter()
                if self._pending[0] is not first:
                    first, progress = self._pending[0], now
                elif now - progress > limit:
                    self._fail(TimeoutError(f"nothing came back within {limit:.0f} s"), first.label)
                self._changed.wait(_POLL_SECONDS)
        self._exposed_seconds += time.perf_counter() - started
        self.check()

    def check(self) -> None:
        """Raises CommunicationError if communication has failed."""
        if self._failure is not None:
            # A new object each time: one that is raised again drags its old traceback along.
            raise CommunicationError(*self._failure.args) from self._failure.__cause__

    def fail(self, error: BaseException, label: str, tensor: torch.Tensor) -> torch.futures.Future[torch.Tensor]:
        """Poisons the communicator with an error of the caller's, and returns a completed future of `tensor`."""
        self._fail(error, label)
        return _Task(label, tensor).deliver()

    def close(self) -> None:
        """Ends the thread and gives the groups back; waits a bounded time, and never raises."""
        thread, self._thread = self._thread, None
        if thread is not None:
            self._queue.put(None)
            thread.join(_GRACE_SECONDS)
            if thread.is_alive():
                _log.warning("communication of %s did not end within %.0f s; its thread is left", self._name, _GRACE_SECONDS)
                return
        if self._failure is None:
            self._destroy_groups()

    def _new_group(self, ranks: tuple[int, ...]) -> Group:
        if len(ranks) == 1 and self.world_size > 1:
            return Group(None)
        # Made by its members alone: the parent may be a part of the world.
        process_group = dist.new_group(
            [dist.get_global_rank(self._parent, rank) for rank in ranks],
            timeout=self._timeout,
            backend=dist.get_backend_config(self._parent),
            use_local_synchronization=True,
        )
        self._owned.append(process_group)
        return Group(process_group)

    def _ring_bytes(self, tensor: torch.Tensor) -> int:
        return 2 * (self.world_size - 1) * tensor.numel() * tensor.element_size() // self.world_size

    def _begin(self, task: _Task) -> bool:
        """Notes a task as pending; False when communication has failed and nothing more may be issued."""
        with self._changed:
            if self._failure is None:
                self._pending.append(task)
            return self._failure is None

    def _finish(self, task: _Task) -> None:
        """Delivers a task, unless a failure has delivered it before."""
        with self._changed:
            if task not in self._pending:
                return
            self._pending.remove(task)
            self._changed.notify_all()
        self._communication_seconds += time.perf_counter() - task.started
        task.deliver()

    def _fail(self, error: BaseException, label: str) -> None:
        with self._changed:
            if self._failure is None:
                self._failure = CommunicationError(
                    f"{self._name}: {label} failed on rank {self.rank} of {self.world_size}: {type(error).__name__}: {error}. "
                    "No rank steps with this gradient. If another rank failed first, its log has the cause; else look for a "
                    "rank that was killed, is stuck, or cannot be reached over the network."
                )
                self._failure.__cause__ = error
                # Closing connections makes peers that wait for this rank fail now. On a thread of its own: it waits for the
                # backend's threads, and this may be one of them.
                threading.Thread(target=self._destroy_groups, name="lightning_accel abandon", daemon=True).start()
            pending, self._pending = self._pending, []
            self._changed.notify_all()
        for task in pending:
            task.deliver()

    def _enqueue(self, run: Callable[[], None]) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name=f"lightning_accel {self._name}", daemon=True)
            self._thread.start()
        self._queue.put(run)

    def _work(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)
        while (run := self._queue.get()) is not None:
            run()

    def _run(self, task: _Task, procedure: Callable[[], None]) -> None:
        if self._failure is not None:
            return  # delivered already
        task.started = time.perf_counter()
        try:
            procedure()
        except BaseException as error:
            self._fail(error, task.label)
        else:
            self._finish(task)

    def _run_on_stream(self, task: _Task, procedure: Callable[[], None], ready: torch.cuda.Event) -> None:
        assert self._stream is not None
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(ready)
            # Delivering records an event of this stream: whoever takes the result waits for it.
            self._run(task, procedure)

    def _destroy_groups(self) -> None:
        owned, self._owned = self._owned, []
        for process_group in owned:
            with contextlib.suppress(Exception):
                dist.destroy_process_group(process_group)
