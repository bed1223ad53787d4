"""Adam whose momentum travels compressed, once its variance has settled: the optimizer of algorithm `qadam`."""

from __future__ import annotations

import inspect
import math
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from enum import Enum
from importlib import import_module
from typing import Any, ClassVar, Literal, overload

import torch
from torch import Tensor

from lightning_accel.native import DTYPES, kernels, run_kernel
from lightning_accel.optim.frozen_variance import find_floors, raise_to_floors
from lightning_accel.optim.memory import by_device_and_dtype, check_dense, complete_state, step_addresses


class Phase(Enum):
    """The two phases of a QAdam."""

    WARMUP = "warmup"
    """Exact Adam on mean gradients."""
    COMPRESSED = "compressed"
    """The variance is frozen; `.grad` holds the ranks' mean momentum when the optimizer steps."""


class QAdam(torch.optim.Adam):
    """Adam in two phases, for `AccelStrategy(algorithm="qadam")`: exact Adam first, compressed momentum afterwards.

    Warm-up, steps t = 1 .. T: torch's own Adam, on the mean of the ranks' gradients.

    Afterwards v stays v_T, raised to a floor (see `optim/frozen_variance.py`). Each rank r folds its own gradient into the
    momentum, which then travels compressed, with error feedback:

        m_r <- beta1 m + (1 - beta1) (g_r + weight_decay x)         during backward
        m   <- Q(1/n sum_r Q(m_r))                                  the all_reduce
        x   <- x - lr m / (1 - beta1^t) / (sqrt(v_T / (1 - beta2^T)) + eps)

    With decoupled weight decay, x <- x - lr weight_decay x replaces the term in m_r. Only `step` changes m: a step that is not
    made changes nothing.

    Source: QAdam (Gan et al. 2021, arXiv:2107.01499) and 1-bit Adam (Tang et al. 2021, arXiv:2102.02888).

    Without the algorithm, or before T, it is Adam (with v frozen, where a state from after T is loaded without the algorithm).
    The state has Adam's names (`step`, `exp_avg`, `exp_avg_sq`); groups also hold `steps` and `frozen_step` (T, 0 in warm-up).

    Args:
        params: Parameters, named parameters or groups as for Adam; a group may have its own lr, betas, eps and weight_decay.
        lr: Learning rate.
        warmup_steps: T, at least 1, in optimizer steps; 15 to 25 % of the training. With "auto", the L1 norm of the
            bias-corrected v is compared with the one before at every 1/(1 - beta2) steps (1000 by default), and v is frozen once
            the smaller is at least 0.96 of the larger: never before 2/(1 - beta2) steps. Source: 1-bit Adam, section 7.1.
        betas: Decay rates of momentum and variance; beta1^2 < beta2.
        eps: Term added to the root of the variance.
        weight_decay: L2 penalty, or decoupled weight decay as in AdamW.
        decoupled_weight_decay: Whether weight decay is decoupled.
        bagua_compat: Whether to make a `lightning_accel.optim.bagua_qadam.BaguaQAdam`, which reproduces Bagua's deviations.
        foreach: Adam's option, for warm-up.
        fused: Adam's option, for warm-up. If both are None, fused is used where torch has it.

    Raises:
        ValueError: If a value is out of range.

    Example:
        >>> optimizer = QAdam([torch.nn.Parameter(torch.zeros(3))], lr=1e-3, warmup_steps=500)
        >>> optimizer.phase
        <Phase.WARMUP: 'warmup'>
    """

    bagua_compat: ClassVar[bool] = False
    """Whether Bagua's deviations are reproduced."""
    default_error_feedback: ClassVar[bool] = True
    """Whether the algorithm keeps what codes lose, where its option says neither yes nor no."""
    prefers_fused: ClassVar[bool] = True
    """Whether warm-up is fused, where neither `fused` nor `foreach` is given."""

    _is_attached: bool
    _calls: Counter[str]
    _folded: set[Tensor]

    def __new__(cls, *args: Any, bagua_compat: bool = False, **options: Any) -> QAdam:
        """Makes an instance of the subclass that `bagua_compat` asks for."""
        # By name: the module of the subclass imports this one.
        subclass: type[QAdam] = (
            import_module("lightning_accel.optim.bagua_qadam").BaguaQAdam if bagua_compat and cls is QAdam else cls
        )
        optimizer = super().__new__(subclass)
        optimizer._is_attached = False
        # Objects, not numbers: Lightning's LightningOptimizer calls methods on a shallow copy.
        optimizer._calls = Counter()
        optimizer._folded = set()
        return optimizer

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 1e-3,
        warmup_steps: int | Literal["auto"] = 100,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        decoupled_weight_decay: bool = False,
        *,
        bagua_compat: bool = False,
        foreach: bool | None = None,
        fused: bool | None = None,
    ) -> None:
        if warmup_steps != "auto" and (isinstance(warmup_steps, bool) or not isinstance(warmup_steps, int) or warmup_steps < 1):
            raise ValueError(f"warmup_steps must be a number of steps, at least 1, or 'auto': got {warmup_steps!r}")
        if bagua_compat and not self.bagua_compat:
            raise ValueError(
                f"bagua_compat=True needs a subclass of lightning_accel.optim.bagua_qadam.BaguaQAdam: got {type(self).__name__}"
            )
        use_fused = fused is None and foreach is None and self.prefers_fused
        super().__init__(
            params, lr, betas, eps, weight_decay, foreach=foreach, fused=fused, decoupled_weight_decay=decoupled_weight_decay
        )
        self.defaults.update(warmup_steps=warmup_steps, bagua_compat=self.bagua_compat)
        for group in self.param_groups:
            self._complete_group(group)
            if use_fused and all(_has_fused(parameter) for parameter in group["params"]):
                group["fused"] = True

    def __setstate__(self, state: dict[str, Any]) -> None:
        for group in state["param_groups"]:
            _check_group(group, self.bagua_compat)
            # Older torch's AdamW does not name it, and Adam would take it for off.
            group.setdefault("decoupled_weight_decay", getattr(self, "defaults", {}).get("decoupled_weight_decay", False))
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self._calls["load"] += 1
        for group in self.param_groups:  # a checkpoint of Adam lacks our entries
            self._complete_group(group)
            if not group["steps"]:
                group["steps"] = max((int(self.state[p].get("step", 0)) for p in group["params"] if p in self.state), default=0)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Adds a group as Adam does; refused after warm-up."""
        if self.param_groups and self.phase is Phase.COMPRESSED:
            raise RuntimeError("parameters cannot join a QAdam after warm-up: their variance would be unknown")
        super().add_param_group(param_group)
        self._complete_group(self.param_groups[-1])

    @property
    def warmup_steps(self) -> int | Literal["auto"]:
        """T in optimizer steps, or "auto"."""
        value: int | Literal["auto"] = self.param_groups[0]["warmup_steps"]
        return value

    @property
    def phase(self) -> Phase:
        """The phase of all groups."""
        return Phase.COMPRESSED if self.param_groups[0]["frozen_step"] else Phase.WARMUP

    @property
    def steps(self) -> int:
        """Number of steps made so far."""
        return max(int(group["steps"]) for group in self.param_groups)

    @property
    def zeroings(self) -> int:
        """Number of calls of `zero_grad` so far."""
        return self._calls["zero_grad"]

    @property
    def loads(self) -> int:
        """Number of times a state was loaded."""
        return self._calls["load"]

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Resets gradients; needed before each backward that follows a step, because `.grad` holds momentum after warm-up."""
        self._calls["zero_grad"] += 1
        self._folded.clear()
        super().zero_grad(set_to_none)

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Makes a step of Adam in warm-up; afterwards steps with the momentum that `.grad` holds.

        Raises:
            RuntimeError: If a gradient scaler is used after warm-up.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        # After the closure: forward and backward may run inside, and the phase changes at a forward.
        self._warn_if_alone()
        if self.phase is Phase.COMPRESSED:
            self._refuse_loss_scaling()
            self._compressed_step()
        else:
            self._warmup_step()
        self._folded.clear()
        for group in self.param_groups:
            group["steps"] += 1
        return loss

    def momentum_of(self, parameter: Tensor) -> Tensor:
        """Returns Adam's `exp_avg`, which is zeros where a parameter has not been stepped yet."""
        complete_state(parameter, self.state[parameter])
        momentum: Tensor = self.state[parameter]["exp_avg"]
        return momentum

    def split_weight_decay(self, group: Mapping[str, Any]) -> tuple[float, float]:
        """Returns the weight decay after warm-up that is folded into a group's momentum, and that which is decoupled."""
        weight_decay = float(group["weight_decay"])
        return (0.0, weight_decay) if group["decoupled_weight_decay"] else (weight_decay, 0.0)

    def freeze(self, floors: Mapping[Tensor, float] | None = None) -> None:
        """Ends warm-up: from here on the variance stays as it is, raised to its floors. Called by the algorithm.

        Args:
            floors: Floors of all optimizers that train the model; None finds its own. A parameter that no gradient has
                reached gets the smallest.

        Raises:
            RuntimeError: If no gradient was different from zero.
        """
        floors = find_floors(self) if floors is None else floors
        if not floors:
            raise RuntimeError("warm-up ends and no gradient was different from zero: QAdam has no variance to go on with")
        for group in self.param_groups:
            group["frozen_step"] = group["steps"]
            for parameter in group["params"]:
                complete_state(parameter, self.state[parameter])
        self._raise_variance(floors)

    def note_folded(self, parameters: Iterable[Tensor]) -> None:
        """Marks parameters whose `.grad` becomes momentum in this backward. Called by the algorithm."""
        self._folded.update(parameters)

    def attach(self) -> None:
        """Notes that an algorithm communicates for this optimizer, and checks parameters for it. Called by the algorithm."""
        for group in self.param_groups:
            for parameter in group["params"]:
                check_dense(parameter)
        self._is_attached = True

    def detach(self) -> None:
        """Notes that the algorithm has ended. Called by the algorithm."""
        self._is_attached = False

    @torch.no_grad()
    def _warmup_step(self) -> None:
        # Unwrapped: the hooks that torch wraps around each class's `step` run around ours already.
        inspect.unwrap(torch.optim.Adam.step)(self)

    def _raise_variance(self, floors: Mapping[Tensor, float]) -> None:
        raise_to_floors(self, floors)

    def _correction_steps(self, group: Mapping[str, Any]) -> int:
        """Returns the number of steps by which the frozen variance is bias-corrected."""
        return int(group["frozen_step"])

    @torch.no_grad()
    def _compressed_step(self) -> None:
        for group in self.param_groups:
            stepped = [parameter for parameter in group["params"] if parameter.grad is not None]
            if not stepped:
                continue
            (beta1, beta2), lr = group["betas"], float(group["lr"])
            step_size = lr / (1 - beta1 ** (group["steps"] + 1))
            correction = math.sqrt(1 - beta2 ** self._correction_steps(group))
            folded_decay, decoupled_decay = self.split_weight_decay(group)
            decay = 1 - lr * decoupled_decay
            torch._foreach_add_([self.state[parameter]["step"] for parameter in stepped], 1)
            for (device, dtype), parameters in by_device_and_dtype(stepped).items():
                code, num_threads = DTYPES.index(dtype), torch.get_num_threads()
                tensors = [(*step_addresses(parameter, self.state[parameter]), parameter.numel()) for parameter in parameters]
                # The algorithm does not fold gradients of parameters outside its model; without an algorithm, nobody does.
                folds = [(g, m, x, n) for p, (g, m, _, x, n) in zip(parameters, tensors, strict=True) if p not in self._folded]
                if folds:
                    run_kernel(kernels.qadam_fold, device, code, folds, beta1, folded_decay, num_threads)
                run_kernel(kernels.qadam_step, device, code, tensors, step_size, correction, group["eps"], decay, num_threads)

    def _complete_group(self, group: dict[str, Any]) -> None:
        _check_group(group, self.bagua_compat)
        # A group that joins during warm-up counts with the others.
        group.setdefault("steps", max((other.get("steps", 0) for other in self.param_groups), default=0))
        group.setdefault("frozen_step", 0)
        for name in ("warmup_steps", "bagua_compat"):
            if name in self.defaults:  # not yet while Adam's constructor runs
                group.setdefault(name, self.defaults[name])

    def _warn_if_alone(self) -> None:
        if not self._is_attached:
            self._is_attached = True  # once
            warnings.warn(
                "QAdam without algorithm 'qadam' is plain Adam: nothing is compressed, whatever warmup_steps says (and a "
                "variance that was frozen before stays so). Use AccelStrategy(algorithm='qadam'), or "
                "lightning_accel.wrap(..., 'qadam')",
                stacklevel=3,
            )

    @property
    def _step_supports_amp_scaling(self) -> bool:
        # A gradient scaler reads it. If True, the scaler sets `found_inf` and always steps the optimizer: after warm-up, this
        # shows that there is a scaler. In warm-up the scaler must unscale and skip by itself.
        return bool(self.param_groups) and self.phase is Phase.COMPRESSED

    @_step_supports_amp_scaling.setter
    def _step_supports_amp_scaling(self, value: bool) -> None:
        """Adam's constructor sets it for `fused`."""

    def _refuse_loss_scaling(self) -> None:
        if getattr(self, "found_inf", None) is not None:
            delattr(self, "found_inf")  # a handler of this error may go on training without the scaler
            raise RuntimeError(
                "QAdam cannot go on under a gradient scaler after warm-up: the momentum that travels would be scaled by a "
                "factor that changes. Train in bf16 or float32 (precision='bf16-mixed'), which need no scaler"
            )


# What help() and LightningCLI show: inspect prefers the signature of __new__.
QAdam.__new__.__signature__ = inspect.signature(QAdam.__init__)  # type: ignore[attr-defined]

QAdamOptimizer = QAdam
"""Another name of `QAdam`."""


def _check_group(group: Mapping[str, Any], bagua_compat: bool) -> None:
    if (wanted := group.get("bagua_compat", bagua_compat)) != bagua_compat:
        raise ValueError(
            f"this optimizer has bagua_compat={bagua_compat}, the group or the loaded state has bagua_compat={wanted}: make the "
            f"optimizer with QAdam(..., bagua_compat={wanted})"
        )
    beta1, beta2 = group["betas"]
    if beta1 * beta1 >= beta2:
        raise ValueError(f"QAdam needs beta1^2 < beta2, or m / sqrt(v) has no bound: got betas {beta1} and {beta2}")
    for name in ("amsgrad", "maximize"):
        if group.get(name):
            raise ValueError(f"QAdam does not take {name}")


def _has_fused(parameter: Tensor) -> bool:
    return parameter.device.type in ("cpu", "cuda") and parameter.is_floating_point()
