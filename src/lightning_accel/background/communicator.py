"""Communication in the background: own process groups, one order on all ranks, and failures that end training.

On the CPU, and where gloo carries CUDA tensors, a daemon thread for each queue runs what is submitted, in the order of
submission. On NCCL no Python thread issues work: what is submitted is enqueued at once, on a side stream for each queue.

After a failure (see `failure`) the groups' connections are closed, which makes the peers fail within moments instead of at
their timeout.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable, Sequence
from datetime import timedelta
from functools import partial

import torch
import torch.distributed as dist

from lightning_accel.background.comm_queue import CommQueue, QueueGroups, Step
from lightning_accel.background.events import CommEvent, Events
from lightning_accel.background.failure import GRACE_SECONDS, PendingWork, WorkTracker
from lightning_accel.background.interpreter_exit import close_at_exit
from lightning_accel.background.statistics import Counters, Statistics
from lightning_accel.logs import get_log
from lightning_accel.transport.gloo import backend_of
from lightning_accel.transport.group import ring_bytes
from lightning_accel.transport.groups import DeviceCollective, OwnedGroups
from lightning_accel.transport.topology import Topology

_log = get_log(__name__)


class Communicator:
    """Runs one replica's communication. Collective: all ranks of `process_group` make it, open queues, and submit alike.

    Args:
        name: Name of the algorithm, for messages.
        process_group: Process group whose ranks take part; None is the default group. It carries nothing of ours.
        device: Device of the tensors.
        timeout: Timeout of a collective; None takes that of `process_group`.
        topology: Ranks by node.

    Attributes:
        name: See above.
        topology: See above.
        queues: Queues that were opened.
        events: Where every step reports what it sent.
        rank: This process's rank in `process_group`.
        world_size: Number of ranks in `process_group`.
        timeout: Timeout of a collective.
    """

    def __init__(
        self,
        name: str,
        process_group: dist.ProcessGroup | None,
        device: torch.device,
        timeout: timedelta | None,
        topology: Topology,
    ) -> None:
        self.name = name
        self.topology = topology
        self.events = Events()
        self._groups = OwnedGroups(process_group, device, timeout)
        self.rank, self.world_size = self._groups.rank, self._groups.world_size
        self.timeout = self._groups.timeout
        self._device = device
        self._uses_threads = device.type == "cpu" or backend_of(self._groups.parent, device) == "gloo"
        self.queues: list[CommQueue] = []
        self._counters = Counters()
        self.events.subscribe(self._counters.observe)
        place = f"rank {self.rank} of {self.world_size}"
        self._tracker = WorkTracker(name, place, self.timeout.total_seconds() + GRACE_SECONDS, self._groups.abandon)
        if self._uses_threads:
            close_at_exit(self)
        # One that is dropped without being closed leaves no thread.
        weakref.finalize(self, _end_threads, self.queues).atexit = False

    def open_queue(self, groups: QueueGroups, backend: str | None = None) -> CommQueue:
        """Makes a queue with groups of its own. Collective.

        Args:
            groups: "all": one of all ranks; "nodes": of this node, and of equal local ranks; "none".
            backend: Backend of the groups; None takes that of the communicator's process group.
        """
        opened = {}
        if groups == "all":
            opened["all"] = self._groups.new([tuple(range(self.world_size))], backend)
        elif groups == "nodes":
            opened["intra_node"] = self._groups.new(self.topology.nodes, backend)
            opened["inter_node"] = self._groups.new(list(zip(*self.topology.nodes, strict=True)), backend)
        self.queues.append(CommQueue(f"{self.name} {len(self.queues)}", opened, self._device))
        return self.queues[-1]

    @property
    def statistics(self) -> Statistics:
        """What communication cost since the start."""
        return self._counters.read()

    def submit(
        self, label: str, tensor: torch.Tensor, *steps: Step, is_gradient: bool = True
    ) -> torch.futures.Future[torch.Tensor]:
        """Runs steps that overwrite `tensor`, one after the other, in the background; in the same order on all ranks.

        Steps that follow one another in one queue run without anything between them.

        Args:
            label: What this is, for messages, such as "bucket 3".
            tensor: What the future delivers; where communication failed, with its local value, and `wait` raises.
            *steps: Parts, each with its queue.
            is_gradient: Whether an uncompressed all_reduce of `tensor` counts as full precision.
        """
        if is_gradient:
            self.count_full_precision([tensor])
        work = PendingWork(label, tensor)
        is_idle = self._tracker.is_idle
        if not self._tracker.begin(work):
            return work.deliver()
        if is_idle and not steps[0].waits and tensor.device.type == "cpu":
            # The network waits for this message, and on busy cores a thread takes milliseconds to wake up beside backward.
            self._run(work, steps, None, may_wait=False)
            return work.future
        ready = torch.cuda.current_stream(self._device).record_event() if tensor.is_cuda else None
        self._pass_on(work, steps, ready)
        return work.future

    def all_reduce(
        self, label: str, tensor: torch.Tensor, queue: CommQueue, *, is_gradient: bool = True
    ) -> torch.futures.Future[torch.Tensor]:
        """Sums `tensor` over all ranks in the background, by the backend's own all_reduce: no thread of ours between.

        But where gloo carries CUDA tensors the queue's thread waits for it: gloo's future completes while the sum is still being
        copied to the GPU, and does not say which stream waits for the copy. Arguments and failures as in `submit`.
        """
        if tensor.is_cuda and self._uses_threads:
            # Waiting lets the queue's stream wait for the copy.
            step = Step("all_reduce", queue, lambda: queue.group.all_reduce(tensor).wait())
            return self.submit(label, tensor, step, is_gradient=is_gradient)
        if is_gradient:
            self.count_full_precision([tensor])
        work = PendingWork(label, tensor)
        if not self._tracker.begin(work):
            return work.deliver()
        started = time.perf_counter()

        def finish(done: torch.futures.Future[list[torch.Tensor]]) -> None:
            try:
                done.value()
                self.report(label, "all_reduce", queue, started, sent_bytes)
            except Exception as error:
                self._tracker.fail(error, label)
            self._tracker.finish(work)

        try:
            reduced = queue.group.all_reduce(tensor).get_future()
            sent_bytes = queue.take_sent_bytes()
            reduced.add_done_callback(finish)
        except Exception as error:
            self._tracker.fail(error, label)
        return work.future

    def run_detached(self, label: str, procedure: Callable[[], None], queue: CommQueue) -> None:
        """Lets a queue's thread run a procedure that takes as long as it likes: `join` waits for it, `wait` does not.

        For communication that runs by itself. A thread runs it on every backend, so the queue's groups must be gloo's. If it
        raises, communication has failed; closing the communicator while it runs is a failure too, here and on other ranks.

        Args:
            label: What this is, for messages.
            procedure: Communicates by the queue's groups, calls `report` after it, and sleeps for short times only: to end in
                time it must notice that communication has failed (`check`).
            queue: Nothing else may use it meanwhile.
        """
        if not self._tracker.begin_detached(label):
            return
        close_at_exit(self)

        def run() -> None:
            try:
                procedure()
            except BaseException as error:
                self._tracker.fail(error, label)
                if not isinstance(error, Exception):
                    raise
            finally:
                self._tracker.finish_detached(label)

        queue.enqueue(run)

    def report(self, label: str, step: str, queue: CommQueue, started: float, sent_bytes: int | None = None) -> None:
        """Emits the event of a step that is done.

        Args:
            label: What was communicated.
            step: Name of the step.
            queue: Queue it ran in.
            started: `time.perf_counter` at its beginning.
            sent_bytes: Bytes sent in it; None takes what the queue has sent since its last event.
        """
        num_bytes = queue.take_sent_bytes() if sent_bytes is None else sent_bytes
        self.events.emit(CommEvent(label, step, queue.name, num_bytes, time.perf_counter() - started))

    def count_full_precision(self, tensors: Sequence[torch.Tensor]) -> None:
        """Counts what an uncompressed all_reduce of tensors sends: once a round, by algorithms that send weights."""
        self._counters.add_full_precision(sum(ring_bytes(tensor, self.world_size) for tensor in tensors))

    def join(self, label: str) -> None:
        """Waits for all that `run_detached` has started, at most for the groups' timeout and some grace, and counts the time.

        Args:
            label: What is waited for, for messages.

        Raises:
            CommunicationError: If anything failed, now or before, or the time is over.
        """
        started = time.perf_counter()
        self._tracker.join(label)
        self._counters.add_exposed(time.perf_counter() - started)
        self.check()

    def wait(self) -> None:
        """Waits, within bounds, for all that was submitted, and counts the time.

        The bound is the groups' timeout and some grace, from the last progress on. On NCCL there is nothing to wait for:
        streams order what follows.

        Raises:
            CommunicationError: If anything failed, now or before.
        """
        started = time.perf_counter()
        if self._uses_threads:
            self._tracker.wait()
        self._counters.add_exposed(time.perf_counter() - started)
        self.check()

    def watch(self, collective: DeviceCollective) -> None:
        """Looks at a device collective in each `check` from now on, and ends it with everything else."""
        self._groups.add(collective)

    def settle(self) -> None:
        """Waits for device collectives, so that nothing is evaluated or saved that has failed on a GPU meanwhile.

        Raises:
            CommunicationError: If communication has failed.
        """
        self._groups.synchronize()
        self.check()

    def check(self) -> None:
        """Raises CommunicationError if communication has failed; does not wait."""
        try:
            self._groups.check()
        except Exception as error:
            self._tracker.fail(error, "an all_reduce")
        self._tracker.check()

    def fail(self, error: BaseException, label: str, tensor: torch.Tensor) -> torch.futures.Future[torch.Tensor]:
        """Poisons the communicator with an error of the caller's, and returns a completed future of `tensor`."""
        self._tracker.fail(error, label)
        return PendingWork(label, tensor).deliver()

    def close(self) -> None:
        """Ends the threads and gives the groups back; waits a bounded time, and never raises.

        What is pending fails, here and on the other ranks.
        """
        self._tracker.close()
        ended = [queue.close() for queue in self.queues]
        if not all(ended):
            _log.warning("communication of %s did not end within %.0f s; a thread is left", self.name, GRACE_SECONDS)
        else:
            self._groups.close(GRACE_SECONDS)

    def _pass_on(self, work: PendingWork, steps: Sequence[Step], ready: torch.cuda.Event | None) -> None:
        """Hands work to its next step's queue, or delivers it; on a GPU, `ready` says when the step before has written."""
        if not steps:
            self._tracker.finish(work)
        elif self._uses_threads:
            steps[0].queue.enqueue(partial(self._run, work, steps, ready))
        else:
            self._run(work, steps, ready)

    def _run(self, work: PendingWork, steps: Sequence[Step], ready: torch.cuda.Event | None, *, may_wait: bool = True) -> None:
        """Runs the next step, and those that follow in the same queue."""
        queue = steps[0].queue
        if self._tracker.has_failed:
            return  # delivered already
        try:
            with queue.on_stream(work.tensor, ready) as written:
                while steps and steps[0].queue is queue and (may_wait or not steps[0].waits):
                    step, *steps = steps
                    started = time.perf_counter()
                    step.run()
                    self.report(work.label, step.name, queue, started)
                # Still on the queue's stream: delivering records an event there, for whoever takes the result.
                self._pass_on(work, steps, written())
        except BaseException as error:
            self._tracker.fail(error, work.label)
            if not isinstance(error, Exception):
                raise


def _end_threads(queues: list[CommQueue]) -> None:
    for queue in queues:
        queue.end()
