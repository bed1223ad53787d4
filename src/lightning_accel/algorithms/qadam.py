"""QAdam: gradients in warm-up, then Adam's momentum, compressed, with error feedback."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from lightning_accel.algorithms.base import Algorithm, BoundAlgorithm, Context, GradBucket
from lightning_accel.algorithms.common.bucket_reducer import BucketReducer
from lightning_accel.algorithms.common.gradient_watch import GradientWatch
from lightning_accel.algorithms.common.option_checks import check_hierarchical
from lightning_accel.algorithms.registry import register_algorithm
from lightning_accel.background.comm_queue import Step
from lightning_accel.compression.codecs import check_codec, uses_feedback
from lightning_accel.native import DTYPES, kernels, run_kernel
from lightning_accel.optim.frozen_variance import find_floors, settling_interval, variance_norm
from lightning_accel.optim.qadam import Phase, QAdam
from lightning_accel.optim.warmup import WarmupAgreement
from lightning_accel.transport.topology import Hierarchical


@register_algorithm("qadam")
@dataclass(frozen=True)
class QAdamAlgorithm(Algorithm):
    """Adam for slow networks: exact in warm-up; afterwards only its momentum travels, compressed. Needs the `QAdam` optimizer.

    Warm-up: g <- 1/n sum_r g_r, uncompressed, and from three ranks on summed in rank order. After it, with v frozen:

    m_r <- beta1 m + (1 - beta1) g_r,  m <- Q(1/n sum_r Q(m_r))

    bucket by bucket during backward, as `bytegrad` does with gradients, each Q with error feedback. The class `QAdam` has the
    equations of the step and the sources.

    A second synchronised backward in a step is folded onto the m that the first one's message delivered.

    Cost of a step for each rank: 2 (n-1)/n times 4 bytes per element in warm-up, and after it 1 for int8, 0.53 for int4, 0.14
    for sign. Memory: from three ranks on twice the gradients in warm-up; error feedback takes 8 (1 + 1/n) bytes per element
    (16 for two ranks). Elements of embedding rows that no gradient has ever reached stay exactly zero in every codec (`sign`: in
    groups of 32).

    Fails when: the variance has not settled when it is frozen (too short a warm-up, a learning rate that still rises); under
    fp16 loss scaling or gradient clipping after warm-up, because `.grad` then holds momentum.

    Args:
        codec: Codec of what travels: "int8", "minmax_uint8", "int4", "sign", "fp16", "bf16" or "none".
        error_feedback: Whether what codes lose is kept and sent later; None asks the optimizer, except with codec "none".
        hierarchical: Whether ranks of a node combine what they have first, uncompressed, so that less travels between nodes:
            True, False, or "auto": when there are several nodes with equally many ranks, more than one, on each.

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
        """Binds the algorithm to a replica, by nodes where the option and the nodes allow it. Collective."""
        return _QAdam(context, self)


class _QAdam(BoundAlgorithm):
    def __init__(self, context: Context, options: QAdamAlgorithm) -> None:
        super().__init__(context)
        self._options = options
        self._queue = self.communicator.open_queue("all")
        hierarchical = self.communicator.topology.use_hierarchy(options.hierarchical)
        self._reducer = BucketReducer(context, options.codec, hierarchical=hierarchical)
        self._optimizers: list[QAdam] = []
        self._warmup = WarmupAgreement(self._agree)
        self._folding = _Folding(self._optimizers)
        self._momenta = _MomentaInGrad(context.parameters.tensors, self._reducer.watch, self._optimizers, self._folding.owners)

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
        if len({(optimizer.warmup_steps, optimizer.default_error_feedback) for optimizer in self._optimizers}) > 1:
            got = [f"{type(optimizer).__name__}(warmup_steps={optimizer.warmup_steps!r})" for optimizer in self._optimizers]
            raise ValueError(
                "all QAdam optimizers of a model need the same warmup_steps and default_error_feedback: their momenta travel "
                f"together. Got {' and '.join(got)}"
            )
        keeps_residuals = self._options.error_feedback
        if keeps_residuals is None:
            keeps_residuals = self._optimizers[0].default_error_feedback and self._options.codec != "none"
        if keeps_residuals:
            self._reducer.keep_residuals()

    def before_forward(self) -> None:
        if not self._optimizers:
            raise RuntimeError(
                "algorithm 'qadam' knows no optimizer: give lightning_accel.QAdam to wrap, or return it from configure_optimizers"
            )
        if self._folding.refresh():
            self._warmup.recount()
        if self._phase is Phase.WARMUP and self._warmup_ends():
            floors = {parameter: floor for optimizer in self._optimizers for parameter, floor in find_floors(optimizer).items()}
            for optimizer in self._optimizers:
                optimizer.freeze(floors)

    def reduce_gradients(self, bucket: GradBucket, label: str) -> torch.futures.Future[torch.Tensor]:
        places = self._reducer.places_of(bucket)
        future = (
            self._reduce_exactly(bucket, label) if self._phase is Phase.WARMUP else self._reduce_momenta(bucket, label, places)
        )
        self._reducer.watch.note_message(places)
        return future

    def after_backward(self) -> None:
        self._momenta.after_backward()
        self._reducer.after_backward()

    def after_step(self, optimizer: torch.optim.Optimizer) -> None:
        self._reducer.after_step(optimizer)

    def teardown(self) -> None:
        self._reducer.close()
        for optimizer in self._optimizers:
            optimizer.detach()

    def state_dict(self) -> dict[str, Any]:
        return self._warmup.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._warmup.load_state_dict(state)

    @property
    def rank_state_layout(self) -> str:  # type: ignore[override]
        return self._reducer.pipeline.residual_layout

    def rank_state_dict(self) -> dict[str, Any]:
        return self._reducer.state_dict()

    def load_rank_state_dict(self, state: dict[str, Any]) -> None:
        self._reducer.load_state_dict(state)

    def reset_rank_state(self) -> None:
        self._reducer.reset_state()

    @property
    def _phase(self) -> Phase:
        return self._optimizers[0].phase

    def _reduce_exactly(self, bucket: GradBucket, label: str) -> torch.futures.Future[torch.Tensor]:
        """Starts to average gradients uncompressed, in an order of summation that no bucket decides."""
        world_size = self.communicator.world_size
        if world_size == 1:
            return super().reduce_gradients(bucket, label)
        if world_size == 2:  # two summands have one order only, and the backend's all_reduce takes the least time
            return self.communicator.all_reduce(label, bucket.buffer().div_(world_size), self._queue)
        return self._reducer.all_reduce(bucket, label, world_size, is_exact=True)

    def _reduce_momenta(self, bucket: GradBucket, label: str, places: Sequence[int]) -> torch.futures.Future[torch.Tensor]:
        """Starts to fold gradients into momenta and to average these, compressed."""
        parameters = bucket.parameters()
        bases = self._momenta.before_message(places)
        for optimizer in self._optimizers:
            optimizer.note_folded(parameters)
        fold = partial(self._folding.fold, bucket.buffer(), parameters, bases)
        world_size = self.communicator.world_size
        if world_size == 1:
            fold()
            return super().reduce_gradients(bucket, label)
        return self._reducer.all_reduce(bucket, label, world_size, before=fold)

    def _warmup_ends(self) -> bool:
        steps, warmup_steps = min(optimizer.steps for optimizer in self._optimizers), self._optimizers[0].warmup_steps
        if warmup_steps != "auto":
            return self._warmup.ends(steps, warmup_steps)
        return self._warmup.ends(steps, settling_interval(self._optimizers), lambda: sum(map(variance_norm, self._optimizers)))

    def _agree(self, value: int) -> int:
        """Returns the least of all ranks' values. Collective, and waits."""
        if self.communicator.world_size == 1:
            return value
        least = torch.tensor([value], dtype=torch.int64, device=self.context.parameters.tensors[0].device)

        def reduce() -> None:
            dist.all_reduce(least, op=dist.ReduceOp.MIN, group=self._queue.group.process_group)

        future = self.communicator.submit("the end of warm-up", least, Step("agree", self._queue, reduce), is_gradient=False)
        self.communicator.wait()
        return int(future.wait().item())


class _Folding:
    """Folds gradients into momenta, with the options of each parameter's group.

    Args:
        optimizers: Optimizers of the model; the list may grow.

    Attributes:
        owners: Optimizer and group of each parameter that has one.
    """

    def __init__(self, optimizers: Sequence[QAdam]) -> None:
        self._optimizers = optimizers
        self.owners: dict[torch.Tensor, tuple[QAdam, dict[str, Any]]] = {}
        self._num_loads, self._num_groups = -1, 0

    def refresh(self) -> bool:
        """Looks the groups up again after a load, which replaces them, or when a group has joined.

        Returns:
            Whether a state was loaded; the same on all ranks, because all of them load.
        """
        num_loads = sum(optimizer.loads for optimizer in self._optimizers)
        groups = [(optimizer, group) for optimizer in self._optimizers for group in optimizer.param_groups]
        is_loaded = num_loads != self._num_loads
        if is_loaded or len(groups) != self._num_groups:
            self.owners.clear()
            self.owners |= {parameter: (optimizer, group) for optimizer, group in groups for parameter in group["params"]}
            self._num_loads, self._num_groups = num_loads, len(groups)
            if self._optimizers[0].phase is Phase.COMPRESSED:
                # Lays a momentum anew that was loaded in another memory format. If a queue's stream did it, it would still read
                # the old memory when the training stream gets it.
                for parameter, (optimizer, _) in self.owners.items():
                    optimizer.momentum_of(parameter)
        return is_loaded

    def fold(
        self, gradients: torch.Tensor, parameters: Sequence[torch.Tensor], bases: Mapping[torch.Tensor, torch.Tensor]
    ) -> None:
        """Turns the gradients of a bucket into this rank's momenta, in place.

        Args:
            gradients: Content of the bucket.
            parameters: Its parameters.
            bases: Momenta to fold onto instead of the last step's, which contain weight decay already (see `_MomentaInGrad`).
        """
        by_scalars: dict[tuple[float, float], list[tuple[int, int, int, int]]] = {}
        address = gradients.data_ptr()
        for parameter in parameters:
            if parameter in self.owners:  # else it has no optimizer, and no momentum
                optimizer, group = self.owners[parameter]
                base, (folded_decay, _) = bases.get(parameter), optimizer.split_weight_decay(group)
                momentum = optimizer.momentum_of(parameter) if base is None else base
                scalars = group["betas"][0], folded_decay if base is None else 0.0
                tensors = by_scalars.setdefault(scalars, [])
                tensors.append((address, momentum.data_ptr(), parameter.data_ptr(), parameter.numel()))
            address += parameter.numel() * gradients.element_size()
        for (beta1, folded_decay), tensors in by_scalars.items():
            # On one thread: backward has the others.
            run_kernel(kernels.qadam_fold, gradients.device, DTYPES.index(gradients.dtype), tensors, beta1, folded_decay, 1)


class _MomentaInGrad:
    """Knows where `.grad` holds the momentum M of the last message while backward adds a gradient g to it.

    Then a bucket arrives with M + g, and the second message of a step must carry M + (1 - beta1) g. That is
    beta1 M + (1 - beta1) (M + g): what has arrived, folded onto M, as a first message's gradient is folded onto the last step's
    momentum. After a step M stands for gradients that are used up, so adding to it is refused.

    Args:
        parameters: Parameters of the model.
        watch: Watches their gradients.
        optimizers: Optimizers of the model; the list may grow.
        owners: Optimizer and group of each parameter that has one; may change.
    """

    def __init__(
        self,
        parameters: Sequence[torch.Tensor],
        watch: GradientWatch,
        optimizers: Sequence[QAdam],
        owners: Mapping[torch.Tensor, tuple[QAdam, dict[str, Any]]],
    ) -> None:
        self._parameters = parameters
        self._watch = watch
        self._optimizers = optimizers
        self._owners = owners
        self._sent: dict[int, tuple[int, int]] = {}
        """Calls of `zero_grad`, and steps, of the owner's at the last message of a parameter whose `.grad` may hold momentum."""
        self._bases: dict[int, torch.Tensor] = {}
        """Copies of momenta, made before backward added to them."""
        self._in_use: list[torch.Tensor] = []
        watch.listen(self._sent, self._before_adding)

    def before_message(self, places: Collection[int]) -> dict[torch.Tensor, torch.Tensor]:
        """Returns what the gradients in a bucket are folded onto, where that is not the last step's momentum.

        Args:
            places: The bucket's parameters.
        """
        bases = {}
        now = {optimizer: (optimizer.zeroings, optimizer.steps) for optimizer in self._optimizers}
        for place in places:
            parameter = self._parameters[place]
            if parameter not in self._owners:
                continue
            has_added = self._watch.has_added(place)
            if not has_added and place in self._sent:
                self._look(place)
            if (base := self._bases.pop(place, None)) is not None:
                bases[parameter] = base
            if base is None or has_added:
                self._sent[place] = now[self._owners[parameter][0]]
        self._in_use += bases.values()
        return bases

    def after_backward(self) -> None:
        """Frees what the backward's messages were folded onto; a GPU has read it by now."""
        self._in_use.clear()

    def _before_adding(self, place: int) -> None:
        if self._look(place) and self._sent[place][1] != self._owners[self._parameters[place]][0].steps:
            raise RuntimeError(
                "after QAdam's warm-up .grad holds momentum, and a backward would add gradients to what a step has used: call "
                "optimizer.zero_grad() after each step"
            )

    def _look(self, place: int) -> bool:
        """Looks whether `.grad` holds the last message's momentum still, and copies it before backward adds to it."""
        parameter = self._parameters[place]
        gradient = parameter.grad
        optimizer, _ = self._owners[parameter]
        if gradient is None or self._sent[place][0] != optimizer.zeroings or not bool(gradient.any()):
            del self._sent[place]
            self._bases.pop(place, None)
            return False
        if place not in self._bases:
            self._bases[place] = torch.empty_like(parameter).copy_(gradient)  # as its parameter lies in memory
        return True
