"""Averages weights in the background, without a lock: no rank waits for another."""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from lightning_accel.algorithms.base import Algorithm, BoundAlgorithm, Context, GradBucket
from lightning_accel.algorithms.common.option_checks import is_integer
from lightning_accel.algorithms.common.weight_exchange import WeightExchange
from lightning_accel.algorithms.registry import register_algorithm
from lightning_accel.collectives import weight_means

_MEETING_SECONDS = 0.05
"""How often ranks' averaging threads meet, at least; what `pause` may take when all ranks call it at once."""

_clock = time.monotonic


@register_algorithm("async")
@dataclass(frozen=True)
class AsyncAverage(Algorithm):
    """Every rank trains by itself, and its weights are averaged with the others' beside it, every `sync_interval_ms`.

    Rank r of n has weights x_r, a contribution v_r and a correction d_r that it has not applied yet, 0 at first:

        step:       x_r <- x_r + u_r              its optimizer's, with its own gradients
        snapshot:   v_r <- x_r                    at the start of a round, when the interval has passed
        averaging:  s = 1/n sum_r v_r,  d_r <- d_r + s - v_r,  v_r <- s
        correction: x_r <- x_r + d_r,  d_r <- 0   at the start of a round, when no averaging is in flight

    Steps taken between a snapshot and its correction survive, and no averaging changes sum_r (x_r + d_r), so none is lost
    and none counts twice. Averaging is done by a thread on each rank. It answers for a rank that is too slow to give a
    snapshot with what it contributed last (v_r = s), so nobody waits for that rank, except `pause` and `consensus`.

    The first `warmup_steps` rounds reduce gradients, as DDP does.

    Source: the asynchronous model average of Bagua (Gan et al. 2021, arXiv:2107.01499). Differs: no lock on the weights, a
    slow rank is answered for, and corrections that have not been applied yet add up.

    Cost of an averaging for each rank: 2 (n-1)/n times the weights' bytes (float16 and bfloat16 travel as float32), in the
    background and over gloo always; training itself copies its weights once and adds to them once. Ranks' threads meet
    every 50 ms for 12 bytes. Memory: the weights three times, and once more during a consensus; on CUDA in pinned
    host memory, and once on the GPU (twice during a consensus).

    Fails when: weights drift apart faster than they are averaged. Give a shorter interval, or some warm-up. Weights that
    are NaN or Inf on one rank become so on all.

    Args:
        sync_interval_ms: milliseconds from the end of an averaging to the snapshots of the next. A rank that gives none for as
            long again is answered for.
        warmup_steps: rounds that reduce gradients at first.

    Raises:
        ValueError: for an interval that is not positive or a negative number of rounds.

    Example:
        >>> AsyncAverage(sync_interval_ms=200)
        AsyncAverage(sync_interval_ms=200, warmup_steps=0)
    """

    sync_interval_ms: int = 500
    warmup_steps: int = 0

    def __post_init__(self) -> None:
        if not is_integer(self.sync_interval_ms) or self.sync_interval_ms <= 0:
            raise ValueError(f"sync_interval_ms must be a positive number of milliseconds: got {self.sync_interval_ms!r}")
        if not is_integer(self.warmup_steps) or self.warmup_steps < 0:
            raise ValueError(f"warmup_steps must be a number of rounds, 0 or more: got {self.warmup_steps!r}")

    def bind(self, context: Context) -> BoundAlgorithm:
        """Makes the groups and the buffers. Collective.

        Raises:
            ValueError: if DDP looks for unused parameters.
        """
        if context.ddp.find_unused_parameters:
            raise ValueError(
                "async does not go with find_unused_parameters=True: DDP then waits for all ranks in every backward to learn "
                "which parameters were used. Gradients stay local here, so leave it at False"
            )
        return _AsyncAverage(context, self)


class _AsyncAverage(WeightExchange):
    """What two threads share is under `_lock`, which nobody holds while waiting for another rank."""

    relays_termination = True

    def __init__(self, context: Context, options: AsyncAverage) -> None:
        super().__init__(context, hierarchical=False, widen=True)
        self._world_size = self.communicator.world_size
        self._warmup_steps = options.warmup_steps
        self._interval_seconds = options.sync_interval_ms / 1000
        # Not NCCL's: its kernels wait on the device, in an order that a thread of its own would not keep.
        self._meetings = self.communicator.open_queue("all", backend="gloo")
        self._flags = torch.zeros(3, dtype=torch.int32)
        self._is_on_host = all(buffer.device.type == "cpu" for buffer in self.buffers)
        if self._is_on_host:
            self._contributions = self.buffers
            self._corrections = self.weights.allocate(multiple=self._world_size)
        else:
            self._contributions, self._corrections = (
                [torch.zeros_like(buffer, device="cpu", pin_memory=True) for buffer in self.buffers] for _ in range(2)
            )
        self._copied: torch.cuda.Event | None = None

        self.averagings = 0
        """Averagings complete so far."""
        self._is_paused = False
        self._is_running = False
        self._lock = threading.Condition()
        self._is_stopping = False
        self._goes_on = False
        self._termination_requested = False
        self._due = 0.0
        self._has_contribution = False
        self._is_snapshot_new = False
        self._is_averaging = False
        self._has_correction = False

    # The training thread's part.

    @property
    def is_in_lockstep(self) -> bool:  # type: ignore[override]
        return self.rounds < self._warmup_steps

    def reduce_gradients(self, bucket: GradBucket, label: str) -> torch.futures.Future[torch.Tensor]:
        if not self.is_in_lockstep:
            return super().reduce_gradients(bucket, label)
        gradients = bucket.buffer().mul_(1 / self._world_size)  # as DDP divides
        return self.communicator.all_reduce(label, gradients, self._queue)

    def before_forward(self) -> None:
        if self._world_size == 1:
            return
        if not self._is_paused:
            self._start()
        if self.is_in_lockstep:
            return
        with self._lock:
            if self._is_averaging:
                return
            self._correct()
            is_due = self._is_running and _clock() >= self._due and not self._is_snapshot_new
            if is_due or not self._has_contribution:
                self.weights.gather(self.buffers)
                self._bring(self.buffers, self._contributions)
                self._is_snapshot_new = is_due
                self._has_contribution = True

    def before_step(self) -> None:
        if self.is_in_lockstep:
            self.rounds += 1  # its gradients are counted
        else:
            super().before_step()

    def pause(self) -> None:
        if self._world_size == 1:
            return
        self._is_paused = True
        self._stop()
        self._correct()

    def resume(self) -> None:
        self._is_paused = False  # the next round starts it, when all ranks have come out of their pause

    @torch.inference_mode(False)  # Lightning's validation begins inside of it, and the queue's thread would get such tensors
    def consensus(self) -> None:
        if self._world_size == 1:
            return
        self._stop()
        self._make_equal()

    @torch.inference_mode(False)
    def consensus_if_terminating(self) -> bool:
        if not self._is_running or self.is_in_lockstep:
            return False
        self._goes_on = True
        self._stop()
        if self.is_terminating:
            self._make_equal()
        return self.is_terminating

    def _make_equal(self) -> None:
        self._correct()
        super().consensus()
        # The next averaging begins from here: what was contributed before would pull back.
        self._bring(self.buffers, self._contributions)
        self._has_contribution = True

    def request_termination(self) -> None:
        self._termination_requested = True

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if self._is_running:
            self._stop()
        # The weights are others now: what was averaged before them is of no use.
        self._has_correction = self._has_contribution = False
        super().load_state_dict(state)

    def _start(self) -> None:
        if self._is_running:
            return
        self._is_running = True
        if not self._goes_on:
            self._due = _clock() + self._interval_seconds
        self._goes_on = False
        self.communicator.run_detached("averaging", partial(_meet, weakref.ref(self), self._lock), self._meetings)

    def _stop(self) -> None:
        """Ends the meetings, on all ranks; from then on this thread has all to itself.

        A rank that has not trained since the last stop may come to this one too: it meets the others for this alone.
        """
        with self._lock:
            self._is_stopping = True
            self._lock.notify_all()
        self._start()
        self.communicator.join("pause")
        self._is_running = self._is_stopping = self._is_snapshot_new = False

    def _correct(self) -> None:
        if self._has_correction:
            self._bring(self._corrections, self.buffers)
            self.weights.add(self._corrections if self._is_on_host else self.buffers)
            self._has_correction = False

    def _bring(self, sources: Sequence[torch.Tensor], targets: Sequence[torch.Tensor]) -> None:
        """Copies between a GPU and the host; nothing where both are the same."""
        if self._is_on_host:
            return
        for target, source in zip(targets, sources, strict=True):
            target.copy_(source, non_blocking=True)
        self._copied = torch.cuda.current_stream(self.buffers[0].device).record_event()

    # The averaging thread's part.

    def meet(self) -> float | None:
        """One meeting of all ranks: shall we average, shall we end? Each rank's part of a sum is a yes or no.

        Returns:
            Seconds to the next one; None if this was the last.
        """
        self.communicator.check()
        with self._lock:
            overdue_seconds = _clock() - self._due
            gives_none = self._is_stopping and not self._goes_on
            has_new = self._is_snapshot_new or gives_none or overdue_seconds >= self._interval_seconds
            is_ready = self._has_contribution and overdue_seconds >= 0 and has_new
            was_stopping = self._is_stopping
            self._flags.copy_(torch.tensor([was_stopping, self._termination_requested, is_ready]))
        started = time.perf_counter()
        self._meetings.group.all_reduce(self._flags).get_future().wait()
        self.communicator.report("averaging", "meet", self._meetings, started)
        stopping, terminating, ready = self._flags.tolist()
        self.is_terminating |= terminating > 0
        is_last = stopping == self._world_size
        # Ranks that stop at each batch for a moment, and go on, would never average otherwise.
        if ready == self._world_size and (not is_last or (self._goes_on and not terminating)):
            self._average()
        if is_last:
            return None
        with self._lock:
            has_news = self._is_stopping and not was_stopping
            return 0.0 if has_news else min(self._interval_seconds, _MEETING_SECONDS)

    def _average(self) -> None:
        with self._lock:
            self._is_averaging = True
        started = time.perf_counter()
        if self._copied is not None:
            self._copied.synchronize()  # the GPU copies when it comes to it
        for contribution, correction in zip(self._contributions, self._corrections, strict=True):
            if not self._has_correction:
                correction.zero_()
            correction.sub_(contribution)
            weight_means.mean(contribution, self._meetings.group, self._meetings.scratch)
            correction.add_(contribution)
        self.communicator.report("averaging", "average", self._meetings, started)
        with self._lock:
            self._due = _clock() + self._interval_seconds
            self._has_correction = True
            self._is_snapshot_new = False
            self._is_averaging = False
            self.averagings += 1


def _meet(averaging: Callable[[], _AsyncAverage | None], lock: threading.Condition) -> None:
    """The averaging thread: meets the other ranks' every now and then. It does not keep a replica alive that was dropped."""
    while True:
        attached = averaging()
        if attached is None:
            raise RuntimeError("the replica was dropped without being closed")
        seconds = attached.meet()
        if seconds is None:
            return
        del attached
        with lock:
            lock.wait(seconds)
