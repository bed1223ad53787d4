"""QAdam: gradients in warm-up, then Adam's momentum, compressed, with error feedback."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from lightning_accel.algorithms.base import Algorithm, BoundAlgorithm, Context, GradBucket
from lightning_accel.algorithms.common.bucket_reducer import BucketReducer
from lightning_accel.algorithms.common.option_checks import check_hierarchical
from lightning_accel.algorithms.registry import register_algorithm
from lightning_accel.background.comm_queue import Step
from lightning_accel.compression.codecs import check_codec, uses_feedback
from lightning_accel.native import DTYPES, kernels, run_kernel
from lightning_accel.optim.qadam import STABLE_RATIO, Phase, QAdam
from lightning_accel.transport.topology import Hierarchical


@register_algorithm("qadam")
@dataclass(frozen=True)
class QAdamAlgorithm(Algorithm):
    """Adam for slow networks: exact in warm-up, then only its momentum travels, compressed. Needs the `QAdam` optimizer.

    Warm-up: g <- 1/n sum_r g_r, uncompressed. After it, with v frozen:

    m_r <- beta1 m + (1 - beta1) g_r,  m <- Q(1/n sum_r Q(m_r))

    bucket by bucket during backward, as `bytegrad` does with gradients, each Q with error feedback. The optimizer's class has
    the step's equations, what differs from Bagua's, and the sources.

    Cost a step for each rank after warm-up: 2 (n-1)/n times 1 byte an element for int8, 0.53 for int4, 0.14 for sign, against
    4; memory for error feedback 8 (1 + 1/n) bytes an element (16 for two ranks). Elements of embedding rows that no gradient has
    ever reached stay exactly zero in every codec (`sign`: in groups of 32).

    Fails when: the variance has not settled when it is frozen (too short a warm-up, a learning rate that still rises); under
    fp16 loss scaling or gradient clipping after warm-up, because `.grad` then holds momentum.

    Args:
        codec: "int8", "int4", "sign", "minmax_uint8", "fp16", "bf16" or "none".
        error_feedback: whether what codes lose is kept and sent later; None: yes, but for "none" and under bagua_compat.
        hierarchical: True, False, or "auto": when there are several nodes with equally many ranks, more than one, on each.
            Then nothing is quantised inside a node.

    Example:
        >>> QAdamAlgorithm(codec="sign").error_feedback is None
        True
    """

    codec: str = "int8"
    error_feedback: bool | None = None
    hierarchical: Hierarchical = "auto"

    keeps_gradients = False

    def __post_init__(self) -> None:
        check_codec(self.codec)
        uses_feedback(self.codec, self.error_feedback)
        check_hierarchical(self.hierarchical)

    def bind(self, context: Context) -> BoundAlgorithm:
        """Makes the flat or the hierarchical form, as the nodes allow. Collective."""
        return _QAdam(context, self)


class _QAdam(BoundAlgorithm):
    def __init__(self, context: Context, options: QAdamAlgorithm) -> None:
        super().__init__(context)
        self._options = options
        self._queue = self.communicator.open_queue("all")
        hierarchical = self.communicator.topology.use_hierarchy(options.hierarchical)
        self._plans = BucketReducer(context, options.codec, hierarchical=hierarchical)
        self._optimizers: list[QAdam] = []
        self._owners: dict[torch.Tensor, tuple[QAdam, dict[str, Any]]] = {}
        # Steps that all ranks have made at least, agreed upon when they may be enough; counted in rounds in between.
        self._agreed_steps: int | None = None
        self._due_step = 0
        self._last_norm = 0.0
        self._indexed = -1, 0
        self._left_momentum: torch.Tensor | None = None
        self._zeroings_before = 0

    def attach_optimizers(self, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        others = [type(optimizer).__name__ for optimizer in optimizers if not isinstance(optimizer, QAdam)]
        if others:
            raise ValueError(
                "algorithm 'qadam' needs lightning_accel.QAdam as every optimizer (from configure_optimizers, or given to wrap): "
                f"got {', '.join(others)}"
            )
        if not optimizers:
            raise ValueError(
                "algorithm 'qadam' needs lightning_accel.QAdam, returned from configure_optimizers: got no optimizer"
            )
        for optimizer in optimizers:
            assert isinstance(optimizer, QAdam)
            optimizer.attach()
            self._optimizers.append(optimizer)
        kinds = {(optimizer.warmup_steps, optimizer.bagua_compat) for optimizer in self._optimizers}
        if len(kinds) > 1:
            raise ValueError(
                "all QAdam optimizers of a model need the same warmup_steps and bagua_compat: their momenta travel together. "
                f"Got {' and '.join(str(kind) for kind in sorted(kinds, key=str))}"
            )
        feedback = self._options.error_feedback
        if feedback or (feedback is None and self._options.codec != "none" and not self._optimizers[0].bagua_compat):
            self._plans.pipeline.keep_residuals()

    def before_forward(self) -> None:
        if not self._optimizers:
            raise RuntimeError(
                "algorithm 'qadam' knows no optimizer: give lightning_accel.QAdam to wrap, or return it from configure_optimizers"
            )
        self._index_groups()
        if self._phase is Phase.WARMUP:
            self._end_warmup_if_due()
        elif self._left_momentum is not None:
            self._left_momentum = self._any_gradient()

    def reduce_gradients(self, bucket: GradBucket, label: str) -> torch.futures.Future[torch.Tensor]:
        world_size = self.communicator.world_size
        if self._phase is Phase.WARMUP:
            if world_size == 1:
                return super().reduce_gradients(bucket, label)
            return self.communicator.all_reduce(label, bucket.buffer().div_(world_size), self._queue)
        momentum, parameters = bucket.buffer(), bucket.parameters()
        if bucket.index() == 0:
            self._note_backward()
        for optimizer in self._optimizers:
            optimizer.note_folded(parameters)
        if world_size == 1:
            self._fold(momentum, parameters)
            return super().reduce_gradients(bucket, label)
        return self._plans.all_reduce(bucket, label, world_size, before=partial(self._fold, momentum, parameters))

    def after_step(self, optimizer: torch.optim.Optimizer) -> None:
        self._plans.commit(optimizer)

    def teardown(self) -> None:
        for optimizer in self._optimizers:
            optimizer.detach()

    def state_dict(self) -> dict[str, Any]:
        return {"due_step": self._due_step, "last_norm": self._last_norm}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._due_step, self._last_norm = int(state["due_step"]), float(state["last_norm"])
        self._agreed_steps = None

    def rank_state_dict(self) -> dict[str, Any]:
        return self._plans.pipeline.state_dict()

    def load_rank_state_dict(self, state: dict[str, Any]) -> None:
        self._plans.pipeline.load_state_dict(state)

    @property
    def _phase(self) -> Phase:
        return self._optimizers[0].phase

    def _end_warmup_if_due(self) -> None:
        """On all ranks in the same round, though a gradient scaler may have skipped steps on one of them."""
        warmup_steps = self._optimizers[0].warmup_steps
        interval = self._interval if warmup_steps == "auto" else warmup_steps
        self._due_step = self._due_step or interval
        if self._agreed_steps is None or self._agreed_steps >= self._due_step:
            self._agreed_steps = self._agree(min(optimizer.steps for optimizer in self._optimizers))
        if self._agreed_steps >= self._due_step:
            if warmup_steps != "auto":
                self._freeze()
            else:
                self._due_step = self._agreed_steps + interval
                # Each rank asks its own variance, whose last bits may differ, and more where a scaler skipped a step.
                if self._agree(int(self._has_settled())):
                    self._freeze()
        self._agreed_steps += 1  # at most, when the next round comes

    def _freeze(self) -> None:
        floors = {parameter: floor for optimizer in self._optimizers for parameter, floor in optimizer.floors().items()}
        for optimizer in self._optimizers:
            optimizer.freeze(floors)

    @property
    def _interval(self) -> int:
        """1/(1 - beta2): how many steps the variance remembers."""
        groups = [group for optimizer in self._optimizers for group in optimizer.param_groups]
        return round(1 / (1 - max(float(group["betas"][1]) for group in groups)))

    def _has_settled(self) -> bool:
        """Whether the variance's norm has changed little since the last time."""
        norm, last = sum(optimizer.variance_norm() for optimizer in self._optimizers), self._last_norm
        self._last_norm = norm
        return min(norm, last) >= STABLE_RATIO * max(norm, last) and last > 0

    def _agree(self, value: int) -> int:
        """The least of all ranks' values. Collective, and waits."""
        if self.communicator.world_size == 1:
            return value
        least = torch.tensor([value], device=self.context.parameters.tensors[0].device)

        def reduce() -> None:
            dist.all_reduce(least, op=dist.ReduceOp.MIN, group=self._queue.group.process_group)

        future = self.communicator.submit("the end of warm-up", least, Step("agree", self._queue, reduce), is_gradient=False)
        self.communicator.wait()
        return int(future.wait().item())

    def _fold(self, momentum: torch.Tensor, parameters: Sequence[torch.Tensor]) -> None:
        """Makes a bucket's gradients this rank's momenta, in place."""
        tensors: dict[tuple[float, float], list[tuple[int, int, int, int]]] = {}
        address = momentum.data_ptr()
        for parameter in parameters:
            if parameter in self._owners:  # else it has no optimizer, and no momentum
                optimizer, group = self._owners[parameter]
                keeps_decay = not (group["decoupled_weight_decay"] or optimizer.bagua_compat)
                scalars = group["betas"][0], group["weight_decay"] if keeps_decay else 0.0
                of_parameter = optimizer.momentum_of(parameter).data_ptr(), parameter.data_ptr(), parameter.numel()
                tensors.setdefault(scalars, []).append((address, *of_parameter))
            address += parameter.numel() * momentum.element_size()
        dtype = DTYPES.index(momentum.dtype)
        for (beta1, weight_decay), of_group in tensors.items():
            # On one thread: backward has the others.
            run_kernel(kernels.qadam_fold, momentum.device, dtype, of_group, beta1, weight_decay, 1)

    @property
    def _zeroings(self) -> int:
        return sum(optimizer.zeroings for optimizer in self._optimizers)

    def _index_groups(self) -> None:
        """Anew when a checkpoint was loaded, which replaces the groups, or a group has joined."""
        loads = sum(optimizer.loads for optimizer in self._optimizers)
        groups = [(optimizer, group) for optimizer in self._optimizers for group in optimizer.param_groups]
        if (loads, len(groups)) != self._indexed:
            self._owners = {parameter: (optimizer, group) for optimizer, group in groups for parameter in group["params"]}
            if loads != self._indexed[0]:  # on all ranks alike, as whatever loads a state
                self._agreed_steps = None
            self._indexed = loads, len(groups)
            if self._phase is Phase.COMPRESSED:
                # A momentum that was loaded in another memory format is laid anew here. On a queue's stream the old one would
                # still be read when the training stream gets its memory.
                for parameter, (optimizer, _) in self._owners.items():
                    optimizer.momentum_of(parameter)

    def _any_gradient(self) -> torch.Tensor | None:
        """Whether `.grad` holds anything but zeros, on its device; None without one. The smallest parameter tells for all."""
        gradients = [parameter.grad for parameter in self._owners if parameter.grad is not None]
        return min(gradients, key=torch.Tensor.numel).any() if gradients else None

    def _note_backward(self) -> None:
        """A backward that adds to what the last one left would take momentum for a gradient.

        Whether somebody has zeroed it otherwise than by the optimizer is asked before the forward and read here, where the
        optimizer has not: reading it waits for the GPU.
        """
        if self._left_momentum is not None and self._zeroings == self._zeroings_before and bool(self._left_momentum):
            raise RuntimeError(
                "after QAdam's warm-up .grad holds momentum, and a second backward has added gradients to it: call "
                "optimizer.zero_grad() before each backward that synchronises (module.zero_grad() is seen before the forward "
                "only), and accumulate under no_sync()"
            )
        self._left_momentum, self._zeroings_before = torch.tensor(True), self._zeroings
