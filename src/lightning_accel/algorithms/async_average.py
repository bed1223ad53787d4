"""Averages weights in the background, without a lock: no rank waits for another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from lightning_accel.algorithms.base import Algorithm, BoundAlgorithm, Context, GradBucket
from lightning_accel.algorithms.common.meetings import Averaging, Contribution, Meetings
from lightning_accel.algorithms.common.option_checks import is_integer
from lightning_accel.algorithms.common.weight_exchange import WeightExchange
from lightning_accel.algorithms.registry import register_algorithm


@register_algorithm("async")
@dataclass(frozen=True)
class AsyncAverage(Algorithm):
    """Lets every rank train by itself, and averages its weights with the others' in the background, every `sync_interval_ms`.

    Rank r of n has weights x_r, a contribution v_r, and a correction d_r that it has not applied yet (0 at first).

        step:       x_r <- x_r + u_r              by its optimizer, with its own gradients
        snapshot:   v_r <- x_r                    at the start of a round, when the interval has passed
        averaging:  s = 1/n sum_r v_r,  d_r <- d_r + s - v_r,  v_r <- s
        correction: x_r <- x_r + d_r,  d_r <- 0   at the start of a round, when no averaging is in flight

    Steps taken between a snapshot and its correction survive, and no averaging changes sum_r (x_r + d_r), so none is lost
    and none counts twice. Averaging is done by a thread on each rank. It answers for a rank that is too slow to give a
    snapshot with what it contributed last (v_r = s), so nobody waits for that rank, except `pause` and `consensus`.

    The first `warmup_steps` rounds reduce gradients, as DDP does.

    Source: the asynchronous model average of Bagua (Gan et al. 2021, arXiv:2107.01499). It differs in that weights are not
    locked, a slow rank is answered for, and corrections that have not been applied yet add up.

    Cost of an averaging for each rank: 2 (n-1)/n times the weights' bytes (float16 and bfloat16 travel as float32), in the
    background and always over gloo; training itself copies its weights once and adds to them once. Ranks' threads meet
    every 50 ms for 12 bytes. Memory: the weights three times, and once more during a consensus; on CUDA in pinned
    host memory, and once on the GPU (twice during a consensus).

    Fails when: weights drift apart faster than they are averaged. Give a shorter interval, or some warm-up. Weights that
    are NaN or Inf on one rank become so on all.

    Args:
        sync_interval_ms: Milliseconds from the end of an averaging to the snapshots of the next. A rank that gives none for as
            long again is answered for.
        warmup_steps: Number of rounds at first that reduce gradients.

    Raises:
        ValueError: if the interval is not positive, or the number of rounds is negative.

    Example:
        >>> AsyncAverage(sync_interval_ms=200)
        AsyncAverage(sync_interval_ms=200, warmup_steps=0)
    """

    unused_parameters_argument = "static_graph"

    sync_interval_ms: int = 500
    warmup_steps: int = 0

    def __post_init__(self) -> None:
        if not is_integer(self.sync_interval_ms) or self.sync_interval_ms <= 0:
            raise ValueError(f"sync_interval_ms must be a positive number of milliseconds: got {self.sync_interval_ms!r}")
        if not is_integer(self.warmup_steps) or self.warmup_steps < 0:
            raise ValueError(f"warmup_steps must be a number of rounds, 0 or more: got {self.warmup_steps!r}")

    def bind(self, context: Context) -> BoundAlgorithm:
        """Makes groups and buffers. Collective.

        Raises:
            ValueError: if DDP looks for unused parameters.
        """
        if context.ddp.find_unused_parameters:
            raise ValueError(
                "async does not go with find_unused_parameters=True: DDP then waits for all ranks in every backward to learn "
                "which parameters were used. Gradients stay local here: leave it at False, and if a loss leaves out the same "
                "parameters in every step, use static_graph=True"
            )
        return _AsyncAverage(context, self)


class _AsyncAverage(WeightExchange):
    """The training thread's part; `meetings` has the averaging thread, and what both share.

    Attributes:
        meetings: Meetings of the averaging threads.
    """

    relays_termination = True

    def __init__(self, context: Context, options: AsyncAverage) -> None:
        super().__init__(context, hierarchical=False, widen=True)
        self._world_size = self.communicator.world_size
        self._warmup_steps = options.warmup_steps
        self._is_paused = False
        self._is_on_host = all(buffer.device.type == "cpu" for buffer in self.buffers)
        if self._is_on_host:
            contributions, corrections = self.buffers, self.weights.allocate(multiple=self._world_size)
        else:
            contributions, corrections = (
                [torch.zeros_like(buffer, device="cpu", pin_memory=True) for buffer in self.buffers] for _ in range(2)
            )
        self.meetings = Meetings(self.communicator, contributions, corrections, options.sync_interval_ms / 1000)

    @property
    def averagings(self) -> int:
        """Number of averagings finished so far."""
        return self.meetings.averagings

    @property
    def is_in_lockstep(self) -> bool:  # type: ignore[override]
        return self.rounds < self._warmup_steps

    @property
    def is_terminating(self) -> bool:  # type: ignore[override]
        return self.meetings.is_terminating

    def request_termination(self) -> None:
        self.meetings.termination_requested = True

    def reduce_gradients(self, bucket: GradBucket, label: str) -> torch.futures.Future[torch.Tensor]:
        if not self.is_in_lockstep:
            return super().reduce_gradients(bucket, label)
        gradients = bucket.buffer().mul_(1 / self._world_size)  # as DDP divides
        return self.communicator.all_reduce(label, gradients, self._queue)

    def before_forward(self) -> None:
        if self._world_size == 1:
            return
        if not self._is_paused:
            self.meetings.start()
        if self.is_in_lockstep:
            return
        with self.meetings.lock:
            if self.meetings.averaging is Averaging.IN_FLIGHT:
                return
            self._correct()
            contribution = self.meetings.wanted()
            if contribution is not None:
                self.weights.gather(self.buffers)
                self._contribute(contribution)

    def before_step(self) -> None:
        if self.is_in_lockstep:
            self.rounds += 1  # its gradients are counted
        else:
            super().before_step()

    def pause(self) -> None:
        if self._world_size == 1:
            return
        self._is_paused = True
        self.meetings.end()
        self._correct()

    def resume(self) -> None:
        self._is_paused = False  # the next round starts meetings, when all ranks have come out of their pause

    @torch.inference_mode(False)  # Lightning's validation begins inside of it, and the queue's thread would get such tensors
    def consensus(self) -> None:
        if self._world_size == 1:
            return
        self.meetings.end()
        self._make_equal()

    @torch.inference_mode(False)
    def consensus_if_terminating(self) -> bool:
        if self.is_in_lockstep or not self.meetings.is_running:
            return False
        self.meetings.suspend()
        if self.is_terminating:
            self._make_equal()
        return self.is_terminating

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if self.meetings.is_running:
            self.meetings.end()
        # The weights are others now: what was averaged before them is of no use.
        self.meetings.has_correction = False
        self.meetings.contribution = Contribution.NONE
        super().load_state_dict(state)

    def _make_equal(self) -> None:
        self._correct()
        super().consensus()
        # The next averaging begins from here: what was contributed before would pull back.
        self._contribute(Contribution.OLD)

    def _contribute(self, contribution: Contribution) -> None:
        self._copy_between(self.buffers, self.meetings.contributions)
        self.meetings.contribution = contribution

    def _correct(self) -> None:
        """Applies what has been averaged to the weights, unless that was done."""
        if self.meetings.has_correction:
            self._copy_between(self.meetings.corrections, self.buffers)
            self.weights.add(self.meetings.corrections if self._is_on_host else self.buffers)
            self.meetings.has_correction = False

    def _copy_between(self, sources: Sequence[torch.Tensor], targets: Sequence[torch.Tensor]) -> None:
        """Copies between a GPU and the host; does nothing where all buffers are on the host."""
        if self._is_on_host:
            return
        for target, source in zip(targets, sources, strict=True):
            target.copy_(source, non_blocking=True)
        self.meetings.copied = torch.cuda.current_stream(self.buffers[0].device).record_event()
