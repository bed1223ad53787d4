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

from lightning_accel.algorithms.base import Algorithm, BoundAlgorithm, Context, GradBucket, register_algorithm
from lightning_accel.flat_weights import FlatWeights

_MEETING_SECONDS = 0.05
"""How often ranks' averaging threads meet, at least; what `pause` may take when all ranks call it at once."""

_LABEL = "averaging"

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

    Cost of an averaging for each rank: 2 (n-1)/n times the weights' bytes (those of float16 and bfloat16 travel as float32);
    of a step: nothing but, once an averaging, a copy of the weights and an addition to them. Memory: the weights twice; on
    CUDA, and for float16 and bfloat16, once more, and the two are in (pinned) host memory, as float32. It runs over gloo always.

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
        if not _is_integer(self.sync_interval_ms) or self.sync_interval_ms <= 0:
            raise ValueError(f"sync_interval_ms must be a positive number of milliseconds: got {self.sync_interval_ms!r}")
        if not _is_integer(self.warmup_steps) or self.warmup_steps < 0:
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


class _AsyncAverage(BoundAlgorithm):
    """What two threads share is under `_lock`, which nobody holds while waiting for another rank."""

    relays_termination = True

    def __init__(self, context: Context, options: AsyncAverage) -> None:
        super().__init__(context)
        context.ddp.broadcast_buffers = False  # DDP would wait for rank 0 in every forward
        self._world_size = self.communicator.world_size
        self._warmup_steps = options.warmup_steps
        self._interval_seconds = options.sync_interval_ms / 1000
        self._gradients_lane = self.communicator.open_lane("all") if options.warmup_steps else None
        # Not NCCL's: its kernels wait on the device, in an order that a thread of its own would not keep.
        self._lane = self.communicator.open_lane("all", backend="gloo")
        self._buffers = _Buffers(FlatWeights(context.parameters.tensors))
        self._flags = torch.zeros(3, dtype=torch.int32)

        self.averagings = 0
        """Averagings complete so far."""
        self._rounds = 0
        self._is_paused = False
        self._is_running = False
        self._lock = threading.Condition()
        self._is_stopping = False
        self._termination_requested = False
        self._due = 0.0
        self._has_contribution = False
        self._is_snapshot_new = False
        self._is_averaging = False
        self._has_correction = False

    # The training thread's part.

    @property
    def is_in_lockstep(self) -> bool:  # type: ignore[override]
        return self._rounds < self._warmup_steps

    def attach_optimizers(self, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        if any(isinstance(optimizer, torch.optim.LBFGS) for optimizer in optimizers):
            raise ValueError(
                "async does not go with LBFGS: it learns the curvature from how the weights have moved, and averaging moves "
                "them too. Use a first-order optimizer"
            )

    def reduce_gradients(self, bucket: GradBucket, label: str) -> torch.futures.Future[torch.Tensor]:
        if not self.is_in_lockstep or self._gradients_lane is None:
            return super().reduce_gradients(bucket, label)
        gradients = bucket.buffer().mul_(1 / self._world_size)  # as DDP divides
        return self.communicator.all_reduce(label, gradients, self._gradients_lane)

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
                self._buffers.take_snapshot()
                self._is_snapshot_new = is_due
                self._has_contribution = True

    def before_step(self) -> None:
        self._rounds += 1

    def pause(self) -> None:
        self._is_paused = True
        self._stop()
        self._correct()

    def resume(self) -> None:
        self._is_paused = False  # the next round starts it, when all ranks have come out of their pause

    @torch.inference_mode(False)  # Lightning's validation begins inside of it, and the thread would get tensors of that kind
    @torch.no_grad()
    def consensus(self) -> None:
        if self._world_size == 1:
            return
        self._stop()
        self._correct()
        # In the warm-up weights are equal already, and a mean would round them.
        weights = self._buffers.contributions if self._has_contribution else []
        if weights:
            self._buffers.take_snapshot()
        statistics, counts = self._module_buffers(True), self._module_buffers(False)
        means = [_concatenated(statistics, torch.float64), *weights]
        sums = [_concatenated(counts, torch.int64) * (self.communicator.rank == 0)]
        self.communicator.run("consensus", partial(self._average_now, means, sums), self._lane)
        self.communicator.join("consensus")
        if weights:
            self._buffers.put_means()
        _put(means[0], statistics)
        _put(sums[0], counts)

    def request_termination(self) -> None:
        self._termination_requested = True

    def state_dict(self) -> dict[str, Any]:
        return {"rounds": self._rounds}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._stop()
        # The weights are others now: what was averaged before them is of no use.
        self._has_correction = self._has_contribution = False
        self._rounds = int(state["rounds"])

    def _start(self) -> None:
        if self._is_running:
            return
        self._is_running = True
        self._due = _clock() + self._interval_seconds
        self.communicator.run(_LABEL, partial(_meet, weakref.ref(self), self._lock), self._lane)

    def _stop(self) -> None:
        """Ends the meetings, on all ranks; from then on this thread has all to itself.

        A rank that has not trained since the last stop may come to this one too: it meets the others for this alone.
        """
        if self._world_size == 1:
            return
        with self._lock:
            self._is_stopping = True
            self._lock.notify_all()
        self._start()
        self.communicator.join("pause")
        self._is_running = self._is_stopping = self._is_snapshot_new = False

    def _module_buffers(self, floating: bool) -> list[torch.Tensor]:
        """BatchNorm's statistics, for example; or, not floating, its count of batches."""
        return [buffer for buffer in self.context.ddp.module.buffers() if buffer.is_floating_point() == floating]

    def _correct(self) -> None:
        if self._has_correction:
            self._buffers.correct_weights()
            self._has_correction = False

    # The averaging thread's part.

    def meet(self) -> float | None:
        """One meeting of all ranks: shall we average, shall we end? Each rank's part of a sum is a yes or no.

        Returns:
            Seconds to the next one; None if this was the last.
        """
        self.communicator.check()
        with self._lock:
            overdue_seconds = _clock() - self._due
            has_new = self._is_snapshot_new or self._is_stopping or overdue_seconds >= self._interval_seconds
            is_ready = self._has_contribution and overdue_seconds >= 0 and has_new
            was_stopping = self._is_stopping
            self._flags.copy_(torch.tensor([was_stopping, self._termination_requested, is_ready]))
        self.communicator.all_reduce_now(self._flags, self._lane)
        stopping, terminating, ready = self._flags.tolist()
        self.is_terminating |= terminating > 0
        if stopping == self._world_size:
            return None
        if ready == self._world_size:
            self._average()
        with self._lock:
            has_news = self._is_stopping and not was_stopping
            return 0.0 if has_news else min(self._interval_seconds, _MEETING_SECONDS)

    def _average(self) -> None:
        with self._lock:
            self._is_averaging = True
        self._buffers.wait_for_copies()
        for contribution, correction in zip(self._buffers.contributions, self._buffers.corrections, strict=True):
            if not self._has_correction:
                correction.zero_()
            correction.sub_(contribution)
            self.communicator.all_reduce_now(contribution, self._lane)
            correction.add_(contribution.div_(self._world_size))
        with self._lock:
            self._due = _clock() + self._interval_seconds
            self._has_correction = True
            self._is_snapshot_new = False
            self._is_averaging = False
            self.averagings += 1

    def _average_now(self, means: list[torch.Tensor], sums: list[torch.Tensor]) -> None:
        self._buffers.wait_for_copies()
        for tensor in [*means, *sums]:
            if tensor.numel():
                self.communicator.all_reduce_now(tensor, self._lane)
        for tensor in means:
            tensor.div_(self._world_size)


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


class _Buffers:
    """The weights' flat buffers on the host, and the way between them and the weights.

    Attributes:
        contributions: v, in float32 or float64, one for each dtype of the weights.
        corrections: d, alike.
    """

    def __init__(self, weights: FlatWeights) -> None:
        self._weights = weights
        self._staged = weights.allocate()
        self._is_direct = all(buffer.device.type == "cpu" and buffer.dtype in _WIDE for buffer in self._staged)
        self._copied: torch.cuda.Event | None = None
        if self._is_direct:
            self.contributions, self.corrections = self._staged, weights.allocate()
        else:
            self.contributions = [_host_buffer(buffer) for buffer in self._staged]
            self.corrections = [_host_buffer(buffer) for buffer in self._staged]

    def take_snapshot(self) -> None:
        """Contribution <- weights."""
        self._weights.gather(self._staged)
        self._copy(self.contributions, self._staged)

    def correct_weights(self) -> None:
        """Weights <- weights + correction."""
        self._weights.add(self._brought(self.corrections))

    def put_means(self) -> None:
        """Weights <- contribution."""
        self._weights.scatter(self._brought(self.contributions))

    def wait_for_copies(self) -> None:
        """Returns when the host's buffers may be read and written: a GPU copies when it comes to it."""
        if self._copied is not None:
            self._copied.synchronize()

    def _brought(self, buffers: list[torch.Tensor]) -> list[torch.Tensor]:
        """Where the weights are."""
        if self._is_direct:
            return buffers
        self._copy(self._staged, buffers)
        return self._staged

    def _copy(self, targets: list[torch.Tensor], sources: list[torch.Tensor]) -> None:
        if self._is_direct:
            return
        for target, source in zip(targets, sources, strict=True):
            target.copy_(source, non_blocking=True)
        if self._staged[0].is_cuda:
            self._copied = torch.cuda.current_stream(self._staged[0].device).record_event()


def _concatenated(tensors: list[torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
    return torch.cat([torch.empty(0, dtype=dtype), *(tensor.detach().flatten().to("cpu", dtype) for tensor in tensors)])


def _put(values: torch.Tensor, tensors: list[torch.Tensor]) -> None:
    """The other way round."""
    parts = torch.split(values, [tensor.numel() for tensor in tensors])
    for tensor, part in zip(tensors, parts, strict=True):
        tensor.detach().copy_(part.view(tensor.shape))


_WIDE = (torch.float32, torch.float64)


def _host_buffer(like: torch.Tensor) -> torch.Tensor:
    dtype = like.dtype if like.dtype in _WIDE else torch.float32
    return torch.zeros(like.numel(), dtype=dtype, pin_memory=like.is_cuda)


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
