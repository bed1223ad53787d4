"""Communication in the background: own process groups, one order on all ranks, counters, and failures that end training.

On the CPU, and where gloo carries CUDA tensors, a daemon thread for each queue runs what is submitted, in the order of
submission. On NCCL no Python thread issues work: what is submitted is enqueued at once, on a side stream for each queue.

The first failure poisons a communicator for good. A collective that one rank missed would let its peers pair later ones up
wrongly and train on with wrong gradients, so nothing more is issued, everything pending and later fails with it, and the
groups' connections are closed, which makes the peers fail within moments instead of at their timeout.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import threading
import time
import traceback
import weakref
from collections.abc import Callable, Sequence
from datetime import timedelta
from functools import partial

import torch
import torch.distributed as dist
from torch.distributed.constants import default_pg_timeout

from lightning_accel.background.comm_queue import CommQueue, QueueGroups, Stage, end_threads, on_stream
from lightning_accel.background.failure import GRACE_SECONDS, POLL_SECONDS, CommunicationError, DeviceCollective
from lightning_accel.background.statistics import Statistics
from lightning_accel.transport.group import Group, backend_of
from lightning_accel.transport.tcp_keepalive import open_sockets, watch_connections
from lightning_accel.transport.topology import Topology

_log = logging.getLogger(__name__)

_CPU = torch.device("cpu")


class PendingWork:
    """One tensor's communication: `future` delivers the tensor once it is overwritten, or as it is after a failure."""

    def __init__(self, label: str, tensor: torch.Tensor) -> None:
        self.label = label
        self.tensor = tensor
        self.future: torch.futures.Future[torch.Tensor] = torch.futures.Future(
            devices=[tensor.device] if tensor.is_cuda else None
        )

    def deliver(self) -> torch.futures.Future[torch.Tensor]:
        """Completes the future."""
        self.future.set_result(self.tensor)
        return self.future


class Communicator:
    """Runs one replica's communication. Collective: all ranks of `process_group` make it, open queues, and submit alike.

    Args:
        name: the algorithm's, for messages.
        process_group: whose ranks take part; None is the default group. It carries nothing of ours: groups of our own do.
        device: of the tensors.
        timeout: of a collective; None takes that of `process_group`.
        topology: ranks by node.
    """

    def __init__(
        self,
        name: str,
        process_group: dist.ProcessGroup | None,
        device: torch.device,
        timeout: timedelta | None,
        topology: Topology,
    ) -> None:
        parent = process_group if process_group is not None else dist.group.WORLD
        assert parent is not None, "torch.distributed has no default process group"
        self.name = name
        self._parent = parent
        self._device = device
        self.timeout = timeout or _timeout_of(parent, device)
        self.topology = topology
        self.rank = dist.get_rank(parent)
        self.world_size = dist.get_world_size(parent)
        self._uses_threads = device.type == "cpu" or backend_of(parent, device) == "gloo"
        self._queues: list[CommQueue] = []
        self._owned: list[dist.ProcessGroup] = []
        self._watched: list[DeviceCollective] = []

        self._full_precision_bytes = 0
        self._communication_seconds = 0.0
        self._exposed_seconds = 0.0

        self._changed = threading.Condition()
        self._pending: list[PendingWork] = []
        self._running: list[str] = []
        self._failure: CommunicationError | None = None
        self._is_closed = False
        self._process_id = os.getpid()
        if self._uses_threads:
            self._close_at_exit()
        # One that is dropped without being closed leaves no thread.
        weakref.finalize(self, end_threads, self._queues).atexit = False
        self._abandoning: threading.Thread | None = None

    def open_queue(self, groups: QueueGroups, backend: str | None = None) -> CommQueue:
        """Makes a queue with a group of all ranks, with groups of this node and of its peers, or with none. Collective.

        Args:
            groups: which.
            backend: of the groups; None takes that of the communicator's process group.
        """
        parts: dict[str, Sequence[tuple[int, ...]]] = {}
        if groups == "all":
            parts["all"] = [tuple(range(self.world_size))]
        elif groups == "nodes":
            parts["intra_node"] = self.topology.nodes
            parts["inter_node"] = list(zip(*self.topology.nodes, strict=True))
        made = {name: self._new_group(part, backend) for name, part in parts.items()}
        queue = CommQueue(f"{self.name} {len(self._queues)}", made, self._device)
        self._queues.append(queue)
        return queue

    @property
    def statistics(self) -> Statistics:
        """Counters since the start."""
        return Statistics(
            sent_bytes=sum(group.sent_bytes for queue in self._queues for group in queue.groups.values()),
            full_precision_bytes=self._full_precision_bytes,
            communication_seconds=self._communication_seconds,
            exposed_seconds=self._exposed_seconds,
        )

    def submit(
        self, label: str, tensor: torch.Tensor, *stages: Stage, first_waits: bool = True, is_gradient: bool = True
    ) -> torch.futures.Future[torch.Tensor]:
        """Runs procedures that overwrite `tensor`, one after the other, in the background; in the same order on all ranks.

        Args:
            label: what this is, for messages, such as "bucket 3".
            tensor: what the future delivers; where communication failed, with its local value, and `wait` raises.
            stages: procedures, each with its queue; they start messages in groups of that queue only.
            first_waits: whether the first one waits for other ranks. One that does not may run here and now.
            is_gradient: whether an uncompressed all_reduce of `tensor` is what `full_precision_bytes` counts.
        """
        if is_gradient:
            self._full_precision_bytes += self._ring_bytes(tensor)
        work = PendingWork(label, tensor)
        is_idle = not self._pending
        if not self._begin(work):
            return work.deliver()
        if is_idle and not first_waits and tensor.device.type == "cpu":
            # The network waits for this message, and on busy cores a thread takes milliseconds to wake up beside backward.
            self._run_stage(work, stages, None)
            return work.future
        ready = torch.cuda.current_stream(self._device).record_event() if tensor.is_cuda else None
        self._run_stages(work, stages, ready)
        return work.future

    def all_reduce(self, label: str, tensor: torch.Tensor, queue: CommQueue) -> torch.futures.Future[torch.Tensor]:
        """Sums `tensor` over all ranks in the background, by the backend's own all_reduce: no thread of ours between.

        But where gloo carries CUDA tensors the queue's thread waits for it: gloo's future completes while the sum is still being
        copied to the GPU, and does not say which stream waits for the copy. Arguments and failures as in `submit`.
        """
        queue.group.sent_bytes += self._ring_bytes(tensor)
        if tensor.is_cuda and self._uses_threads:

            def reduce() -> None:
                _start_all_reduce(tensor, queue).wait()  # lets the queue's stream wait for the copy

            return self.submit(label, tensor, (queue, reduce))
        self._full_precision_bytes += self._ring_bytes(tensor)
        work = PendingWork(label, tensor)
        if not self._begin(work):
            return work.deliver()
        started = time.perf_counter()

        def finish(done: torch.futures.Future[list[torch.Tensor]]) -> None:
            try:
                done.value()
            except Exception as error:
                self._fail(error, label)
            self.count_seconds(started)
            self._finish(work)

        try:
            _start_all_reduce(tensor, queue).get_future().add_done_callback(finish)
        except Exception as error:
            self._fail(error, label)
        return work.future

    def count_full_precision(self, tensors: Sequence[torch.Tensor]) -> None:
        """Counts what an uncompressed all_reduce of their gradients sends: once a round, by algorithms that send weights."""
        self._full_precision_bytes += sum(self._ring_bytes(tensor) for tensor in tensors)

    def run(self, label: str, procedure: Callable[[], None], queue: CommQueue) -> None:
        """Lets a queue's thread run a procedure that takes as long as it likes: `join` waits for it, `wait` does not.

        For communication that runs by itself. A thread runs it on every backend, so the queue's groups must be gloo's. If it
        raises, communication has failed; closing the communicator while it runs is a failure too, here and on other ranks.

        Args:
            label: what this is, for messages.
            procedure: communicates by `all_reduce_now`, and sleeps for short times only: to end in time it must notice that
                communication has failed (`check`).
            queue: nothing else may use it meanwhile.
        """
        with self._changed:
            if self._failure is not None:
                return
            self._check_open(label)
            self._running.append(label)
        self._close_at_exit()

        def run() -> None:
            try:
                procedure()
            except BaseException as error:
                self._fail(error, label)
                if not isinstance(error, Exception):
                    raise
            finally:
                with self._changed:
                    self._running.remove(label)
                    self._changed.notify_all()

        queue.enqueue(run)

    def all_reduce_now(self, tensor: torch.Tensor, queue: CommQueue) -> None:
        """Sums `tensor`, on the CPU, over all ranks, and returns when it is done; for procedures that `run` has started."""
        queue.group.sent_bytes += self._ring_bytes(tensor)
        started = time.perf_counter()
        _start_all_reduce(tensor, queue).get_future().wait()
        self.count_seconds(started)

    def count_seconds(self, started: float) -> None:
        """Counts the time since `started`, of `time.perf_counter`, as spent in communication."""
        with self._changed:
            self._communication_seconds += time.perf_counter() - started

    def join(self, label: str) -> None:
        """Waits for all that `run` has started, at most for the groups' timeout and some grace, and counts the time.

        Args:
            label: what is waited for, for messages.

        Raises:
            CommunicationError: if anything failed, now or before, or the time is over.
        """
        started = time.perf_counter()
        with self._changed:
            while self._running and self._failure is None:
                if time.perf_counter() - started > self._limit_seconds:
                    self._fail(TimeoutError(f"other ranks did not join within {self._limit_seconds:.0f} s"), label)
                self._changed.wait(POLL_SECONDS)
        self._exposed_seconds += time.perf_counter() - started
        self.check()

    def wait(self) -> None:
        """Waits, within bounds, for all that was submitted, and counts the time.

        The bound is the groups' timeout and some grace, from the last progress on. On NCCL there is nothing to wait for:
        streams order what follows.

        Raises:
            CommunicationError: if anything failed, now or before.
        """
        started = progress = time.perf_counter()
        limit = self._limit_seconds
        with self._changed:
            first = None
            while self._pending and self._uses_threads:
                now = time.perf_counter()
                if self._pending[0] is not first:
                    first, progress = self._pending[0], now
                elif now - progress > limit:
                    self._fail(TimeoutError(f"nothing came back within {limit:.0f} s"), first.label)
                self._changed.wait(POLL_SECONDS)
        self._exposed_seconds += time.perf_counter() - started
        self.check()

    def watch(self, watched: DeviceCollective) -> None:
        """Looks at it in each `check` from now on, and ends it with everything else."""
        self._watched.append(watched)

    def settle(self) -> None:
        """Waits for what is watched, so that nothing is evaluated or saved that has failed on a GPU meanwhile.

        Raises:
            CommunicationError: if it has failed.
        """
        if self._watched:
            if self._device.type == "cuda":
                torch.cuda.synchronize(self._device)
            self.check()

    def check(self) -> None:
        """Raises CommunicationError if communication has failed."""
        for watched in self._watched:
            try:
                watched.check()
            except Exception as error:
                self._fail(error, "an all_reduce")
        if self._failure is not None:
            # A new object each time: one that is raised again drags its old traceback along.
            raise CommunicationError(*self._failure.args) from self._failure.__cause__

    def fail(self, error: BaseException, label: str, tensor: torch.Tensor) -> torch.futures.Future[torch.Tensor]:
        """Poisons the communicator with an error of the caller's, and returns a completed future of `tensor`."""
        self._fail(error, label)
        return PendingWork(label, tensor).deliver()

    def close(self) -> None:
        """Ends the threads and gives the groups back; waits a bounded time, and never raises.

        What is pending fails, here and on the other ranks. Called at the interpreter's exit too: a thread that comes out of a
        native call after it would end the process by force.
        """
        with self._changed:
            self._is_closed = True
            unfinished = [work.label for work in self._pending] + self._running
        for label in unfinished[:1]:
            self._fail(RuntimeError("communication was closed before it was done"), label)
        ended = [queue.close() for queue in self._queues]
        if not all(ended):
            _log.warning("communication of %s did not end within %.0f s; a thread is left", self.name, GRACE_SECONDS)
        elif self._abandoning is None:
            # NCCL flushes what is enqueued before it gives a group back, and a peer may never answer.
            self._abandoning = threading.Thread(target=self._destroy_groups, name="lightning_accel close", daemon=True)
            with contextlib.suppress(RuntimeError):
                self._abandoning.start()
        if self._abandoning is not None and self._abandoning.is_alive():
            self._abandoning.join(GRACE_SECONDS)

    def _new_group(self, parts: Sequence[tuple[int, ...]], backend: str | None) -> Group:
        """Makes the group of each part of the ranks, and returns the one with this rank. Collective."""
        own = next(part for part in parts if self.rank in part)
        if len(own) == 1 and self.world_size > 1:
            return Group(None)
        # Where the parent is the world, every rank makes all groups: torch then numbers them, and never twice alike. Groups
        # made by their members alone have the name of one that was closed before, and find its addresses in the store.
        is_world = self._parent is dist.group.WORLD
        others = open_sockets()
        if backend is None and (backend := dist.get_backend(self._parent)) == dist.Backend.UNDEFINED:
            backend = dist.get_backend_config(self._parent)
        for part in parts if is_world else [own]:
            process_group = dist.new_group(
                [dist.get_global_rank(self._parent, rank) for rank in part],
                timeout=self.timeout,
                backend=backend,
                use_local_synchronization=not is_world,
            )
            if part == own:
                self._owned.append(process_group)
        if backend_of(self._owned[-1], _CPU) == "gloo":
            # A rank that closes the group at once would cut off those that still connect.
            dist.all_reduce(torch.zeros(1), group=self._owned[-1])
            watch_connections(others)
        return Group(self._owned[-1])

    @property
    def _limit_seconds(self) -> float:
        return self.timeout.total_seconds() + GRACE_SECONDS

    def _close_at_exit(self) -> None:
        if not _at_exit:
            atexit.register(_close_all)
        _at_exit.add(self)

    def _ring_bytes(self, tensor: torch.Tensor) -> int:
        return 2 * (self.world_size - 1) * tensor.numel() * tensor.element_size() // self.world_size

    def _begin(self, work: PendingWork) -> bool:
        """Notes a work as pending; False when communication has failed and nothing more may be issued."""
        with self._changed:
            if self._failure is None:
                self._check_open(work.label)
                self._pending.append(work)
            return self._failure is None

    def _check_open(self, label: str) -> None:
        if self._is_closed:  # a thread started now would stay
            raise RuntimeError(f"{self.name}: {label} was started after communication was closed")

    def _run_stages(self, work: PendingWork, stages: tuple[Stage, ...], ready: torch.cuda.Event | None) -> None:
        """Passes a work on to its next stage, or delivers it; on a GPU, `ready` says when the stage before has written."""
        if not stages:
            self._finish(work)
        elif self._uses_threads:
            stages[0][0].enqueue(partial(self._run_stage, work, stages, ready))
        else:
            self._run_stage(work, stages, ready)

    def _run_stage(self, work: PendingWork, stages: tuple[Stage, ...], ready: torch.cuda.Event | None) -> None:
        queue, procedure = stages[0]
        if self._failure is not None:
            return  # delivered already
        started = time.perf_counter()
        try:
            with on_stream(queue, work.tensor, ready) as written:
                procedure()
                self.count_seconds(started)
                # Still on the queue's stream: delivering records an event there, for whoever takes the result.
                self._run_stages(work, stages[1:], written())
        except BaseException as error:
            self._fail(error, work.label)
            if not isinstance(error, Exception):
                raise

    def _finish(self, work: PendingWork) -> None:
        """Delivers a work, unless a failure has delivered it before."""
        with self._changed:
            if work not in self._pending:
                return
            self._pending.remove(work)
            self._changed.notify_all()
        work.deliver()

    def _fail(self, error: BaseException, label: str) -> None:
        with self._changed:
            if self._failure is None:
                self._failure = CommunicationError(
                    f"{self.name}: {label} failed on rank {self.rank} of {self.world_size}: {type(error).__name__}: {error}. "
                    "No rank steps with what has arrived. If another rank failed first, its log has the cause; else look for a "
                    "rank that was killed, is stuck, or cannot be reached over the network."
                )
                self._failure.__cause__ = error
                # A traceback keeps the variables of its frames, the group among them, and with it the connections.
                traceback.clear_frames(error.__traceback__)
                for watched in self._watched:  # first: closing what waits on a GPU takes as long as it waits
                    watched.abort()
                # Closing connections makes peers that wait for this rank fail now, and this rank's other queues. On a thread of
                # its own: it waits for the backend's threads, and this may be one of them.
                self._abandoning = threading.Thread(target=self._abort_groups, name="lightning_accel abandon", daemon=True)
                with contextlib.suppress(RuntimeError):  # an interpreter that ends starts no threads, and closes anyway
                    self._abandoning.start()
            pending, self._pending = self._pending, []
            self._changed.notify_all()
        for work in pending:
            work.deliver()

    def _abort_groups(self) -> None:
        for queue in self._queues:
            for group in queue.groups.values():
                group.abort()
        self._destroy_groups()

    def _destroy_groups(self) -> None:
        while self._watched:
            with contextlib.suppress(Exception):
                self._watched.pop().close()
        # Nothing may keep the groups from here on. Connections close with the last reference; and one dropped by a callback,
        # on a thread of the group itself, would wait for that thread.
        for queue in self._queues:
            for group in queue.groups.values():
                group.process_group = None
        while self._owned:
            process_group = self._owned.pop()
            with contextlib.suppress(Exception):
                dist.destroy_process_group(process_group)
            del process_group


def _timeout_of(process_group: dist.ProcessGroup, device: torch.device) -> timedelta:
    # A group made of another one has torch's default, not the other's.
    options = getattr(process_group._get_backend(device), "options", None)
    timeout: timedelta = getattr(options, "_timeout", default_pg_timeout)
    return timeout


_at_exit: weakref.WeakSet[Communicator] = weakref.WeakSet()


def _close_all() -> None:
    for communicator in list(_at_exit):
        if communicator._process_id == os.getpid():  # a forked process has neither threads nor connections of its own
            communicator.close()


def _start_all_reduce(tensor: torch.Tensor, queue: CommQueue) -> dist.Work:
    process_group = queue.group.process_group
    assert process_group is not None, "the group was closed"  # None would be torch's default group
    work: dist.Work | None = dist.all_reduce(tensor, group=process_group, async_op=True)
    assert work is not None
    return work
