"""Meetings of all ranks' averaging threads, and what such a thread shares with the training thread."""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable, Sequence
from enum import Enum, auto
from functools import partial

import torch

from lightning_accel.background.communicator import Communicator
from lightning_accel.collectives import weight_means

MEETING_SECONDS = 0.05
"""Longest time between two meetings; `Meetings.end` may take as long when all ranks call it at once."""


class Life(Enum):
    """Whether the averaging threads meet."""

    ENDED = auto()
    """No thread runs; the next averaging is due an interval after the next start."""

    SUSPENDED = auto()
    """No thread runs; averagings stay due when they were."""

    RUNNING = auto()
    """The threads meet until all ranks want to stop."""

    ENDING = auto()
    """This rank wants to stop, and gives no more snapshots."""

    SUSPENDING = auto()
    """This rank wants to stop, and to go on later: an averaging that is due is done in the last meeting."""


class Contribution(Enum):
    """What this rank gives to the next averaging."""

    NONE = auto()
    """Nothing yet."""

    OLD = auto()
    """What it gave before, or what the last averaging or consensus gave it; taken if no snapshot comes in time."""

    NEW = auto()
    """A snapshot that has not been averaged yet."""


class Averaging(Enum):
    """Whose the contributions and corrections are."""

    IDLE = auto()
    """The training thread's, under the lock."""

    IN_FLIGHT = auto()
    """The averaging thread's."""


class Meetings:
    """Averages contributions in the background, when the votes of all ranks say so. Making it is collective.

    A thread on each rank meets those of the others every now and then. It holds `lock` to read or change what follows, but
    never while it waits for another rank. While no meetings run, everything belongs to the training thread.

    Args:
        communicator: Communicator of the replica.
        contributions: Buffers on the CPU, one for each dtype, with what this rank gives; means overwrite them.
        corrections: Buffers of the same sizes, to which means minus contributions are added.
        interval_seconds: Time from the end of an averaging until the next is due. A rank that gives no new snapshot for as
            long again is answered for.

    Attributes:
        lock: Condition that guards the states; notified when this rank wants to stop.
        clock: Function that tells the time in seconds; a test may replace it before the first start.
        due: Time, by `clock`, from which on snapshots are taken for the next averaging.
        has_correction: Whether corrections hold something that has not been applied to the weights.
        averagings: Number of averagings finished so far.
        copied: Event after the last copy between a GPU and the buffers, which an averaging waits for.
        termination_requested: Whether this rank is to end; written by a signal handler, without the lock.
        is_terminating: Whether a rank is to end, as all ranks know from a meeting.
    """

    def __init__(
        self,
        communicator: Communicator,
        contributions: Sequence[torch.Tensor],
        corrections: Sequence[torch.Tensor],
        interval_seconds: float,
    ) -> None:
        self.communicator = communicator
        # Not NCCL's: its kernels wait on the device, in an order that a thread of its own would not keep.
        self.queue = communicator.open_queue("all", backend="gloo")
        self.contributions, self.corrections = contributions, corrections
        self.interval_seconds = interval_seconds
        self.lock = threading.Condition()
        self.clock = time.monotonic
        self.due = 0.0
        self.life, self.contribution, self.averaging = Life.ENDED, Contribution.NONE, Averaging.IDLE
        self.has_correction = False
        self.averagings = 0
        self.copied: torch.cuda.Event | None = None
        self.termination_requested = self.is_terminating = False
        self._votes = torch.zeros(3, dtype=torch.int32, device="cpu")

    # The training thread's part.

    @property
    def is_running(self) -> bool:
        """Whether this rank's thread runs, or has failed."""
        return self.life not in (Life.ENDED, Life.SUSPENDED)

    def start(self) -> None:
        """Starts this rank's thread, unless it runs."""
        if not self.is_running:
            self._run(Life.RUNNING)

    def end(self) -> None:
        """Ends the meetings on all ranks. Collective; a rank whose thread does not run meets the others for this alone."""
        self._stop(Life.ENDING, Life.ENDED)

    def suspend(self) -> None:
        """Ends the meetings on all ranks until the next start. Collective."""
        self._stop(Life.SUSPENDING, Life.SUSPENDED)

    def wanted(self) -> Contribution | None:
        """Returns what a snapshot taken now would be; None if none is wanted. Called under the lock, no averaging in flight."""
        if self.is_running and self.clock() >= self.due and self.contribution is not Contribution.NEW:
            return Contribution.NEW
        return Contribution.OLD if self.contribution is Contribution.NONE else None

    def _run(self, life: Life) -> None:
        if self.life is Life.ENDED:
            self.due = self.clock() + self.interval_seconds
        self.life = life
        self.communicator.run_detached("averaging", partial(_meet, weakref.ref(self), self.lock), self.queue)

    def _stop(self, stopping: Life, stopped: Life) -> None:
        if self.is_running:
            with self.lock:
                self.life = stopping
                self.lock.notify_all()
        else:
            self._run(stopping)
        self.communicator.join("pause")
        self.life = stopped
        if self.contribution is Contribution.NEW:
            self.contribution = Contribution.OLD

    # The averaging thread's part.

    def meet(self) -> float | None:
        """Meets the other ranks once: they vote whether to stop, whether one of them is to end, and whether to average.

        Returns:
            Seconds until the next meeting; None after the last one.
        """
        self.communicator.check()
        with self.lock:
            life = self.life
            overdue_seconds = self.clock() - self.due
            takes_old = life is Life.ENDING or overdue_seconds >= self.interval_seconds
            has_one = self.contribution is Contribution.NEW or (self.contribution is Contribution.OLD and takes_old)
            is_ready = has_one and overdue_seconds >= 0
            self._votes.copy_(
                torch.tensor([life is not Life.RUNNING, self.termination_requested, is_ready], dtype=torch.int32, device="cpu")
            )
        started = time.perf_counter()
        self.queue.group.all_reduce(self._votes).get_future().wait()
        self.communicator.report("averaging", "meet", self.queue, started)
        stopping, terminating, ready = self._votes.tolist()
        self.is_terminating |= terminating > 0
        is_last = stopping == self.communicator.world_size
        # Ranks that stop at each batch for a moment, and go on, would never average otherwise.
        may_average = not is_last or (life is Life.SUSPENDING and not terminating)
        if may_average and ready == self.communicator.world_size:
            self._average()
        if is_last:
            return None
        with self.lock:
            has_news = life is Life.RUNNING and self.life is not Life.RUNNING
            return 0.0 if has_news else min(self.interval_seconds, MEETING_SECONDS)

    def _average(self) -> None:
        with self.lock:
            self.averaging = Averaging.IN_FLIGHT
        started = time.perf_counter()
        if self.copied is not None:
            self.copied.synchronize()  # the GPU copies when it comes to it
        for contribution, correction in zip(self.contributions, self.corrections, strict=True):
            if not self.has_correction:
                correction.zero_()
            correction.sub_(contribution)
            weight_means.mean(contribution, self.queue.group, self.queue.scratch)
            correction.add_(contribution)
        self.communicator.report("averaging", "average", self.queue, started)
        with self.lock:
            self.due = self.clock() + self.interval_seconds
            self.has_correction = True
            self.contribution = Contribution.OLD
            self.averaging = Averaging.IDLE
            self.averagings += 1


def _meet(reference: Callable[[], Meetings | None], lock: threading.Condition) -> None:
    """Runs the averaging thread; it does not keep a replica alive that was dropped."""
    while True:
        meetings = reference()
        if meetings is None:
            raise RuntimeError("the replica was dropped without being closed")
        seconds = meetings.meet()
        if seconds is None:
            return
        del meetings
        with lock:
            lock.wait(seconds)
