"""Adam whose momentum travels compressed, once its variance has settled: the optimizer of algorithm `qadam`."""

from __future__ import annotations

import inspect
import math
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from enum import Enum
from typing import Any, Literal, overload

import torch
from torch import Tensor

from lightning_accel.native import DTYPES, kernels, run_kernel

STABLE_RATIO = 0.96
"""`warmup_steps="auto"`: how near to 1 the ratio of the variance's norms must be (1-bit Adam, section 7.1)."""


class Phase(Enum):
    """Where a QAdam is in its life."""

    WARMUP = "warmup"
    """Exact Adam on mean gradients."""
    COMPRESSED = "compressed"
    """The variance is frozen; `.grad` holds the ranks' mean momentum when the optimizer steps."""


class QAdam(torch.optim.Adam):
    """Adam in two phases, for `AccelStrategy(algorithm="qadam")`: exact Adam first, compressed momentum afterwards.

    Warm-up, steps t = 1 .. T: torch's own Adam, on the mean of the ranks' gradients.

    Afterwards v stays v_T, and each rank r folds its own gradient into the momentum, which then travels compressed, with
    error feedback:

        m_r <- beta1 m + (1 - beta1) (g_r + weight_decay x)         during backward
        m   <- Q(1/n sum_r Q(m_r))                                  the all_reduce
        x   <- x - lr m / (1 - beta1^t) / (sqrt(v_T / (1 - beta2^T)) + eps)

    (with decoupled weight decay x <- x - lr weight_decay x instead of the term in m_r). m is taken up in `step` only: a step
    that is not made changes nothing.

    The floor. Where v_T is zero or tiny (an embedding's row that was not seen in warm-up) Adam's quotient would explode. So
    v_T <- max(v_T, median / B^2), with the median of the parameter's non-zero v_T, and

        B = (1 - beta1) / sqrt((1 - beta2) (1 - beta1^2 / beta2)),

    which by Cauchy and Schwarz is the largest |m| / sqrt(v) that Adam itself can reach, whatever the gradients (7.27 by
    default). So a gradient as large as is usual for the parameter moves an element at most as far as Adam could. A parameter
    that no gradient has reached takes the smallest floor of the others.

    Source: QAdam of Bagua (Gan et al. 2021, arXiv:2107.01499) and 1-bit Adam (Tang et al. 2021, arXiv:2102.02888). Bagua's
    drops the gradient of step T, corrects the frozen v with a beta2^t that moves on, loses weight decay after T and has no
    error feedback; `bagua_compat` does as it does.

    Without the algorithm, or before T, it is Adam (with v frozen, where a state from after T is loaded without the algorithm).
    The state has Adam's names (`step`, `exp_avg`, `exp_avg_sq`); groups remember `steps` and `frozen_step` (T, 0 in warm-up).

    Args:
        params: as in Adam: parameters, named parameters or groups, each with its own lr, betas, eps, weight_decay if wanted.
        lr: learning rate.
        warmup_steps: T, at least 1, in optimizer steps; 15 to 25 % of the training. "auto": at every 1/(1 - beta2) steps (1000
            by default) the L1 norm of the bias-corrected v is compared with the one before; once the smaller is at least 0.96
            of the larger, v is frozen: never before 2/(1 - beta2) steps. Source: 1-bit Adam, section 7.1.
        betas: decay of momentum and of variance; beta1^2 < beta2.
        eps: added to the root of the variance.
        weight_decay: L2, or decoupled as in AdamW.
        decoupled_weight_decay: see there.
        bagua_compat: reproduces Bagua's deviations.
        foreach: as in Adam, for warm-up.
        fused: as in Adam, for warm-up. If both are None, fused is used where torch has it.

    Raises:
        ValueError: for a value out of range.

    Example:
        >>> optimizer = QAdam([torch.nn.Parameter(torch.zeros(3))], lr=1e-3, warmup_steps=500)
        >>> optimizer.phase
        <Phase.WARMUP: 'warmup'>
    """

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
        self._is_attached = False
        # Objects, not numbers: Lightning's LightningOptimizer calls methods on a shallow copy.
        self._calls: Counter[str] = Counter()
        self._folded: set[Tensor] = set()
        use_fused = fused is None and foreach is None and not bagua_compat
        super().__init__(
            params,
            lr=lr,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            decoupled_weight_decay=decoupled_weight_decay,
            foreach=foreach,
            fused=fused,
        )
        self.defaults.update(warmup_steps=warmup_steps, bagua_compat=bagua_compat)
        for group in self.param_groups:
            self._complete_group(group)
            if use_fused and all(_has_fused(parameter) for parameter in group["params"]):
                group["fused"] = True

    def __setstate__(self, state: dict[str, Any]) -> None:
        for group in state["param_groups"]:  # older torch's AdamW does not name it, and Adam would take it for off
            group.setdefault("decoupled_weight_decay", getattr(self, "defaults", {}).get("decoupled_weight_decay", False))
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self.__dict__.setdefault("_is_attached", False)
        self.__dict__.setdefault("_calls", Counter())
        self.__dict__.setdefault("_folded", set())
        self._calls["load"] += 1
        for group in self.param_groups:  # those of a checkpoint of Adam lack them
            self._complete_group(group)
            if not group["steps"]:
                group["steps"] = max((int(_steps_of(self.state[p])) for p in group["params"] if p in self.state), default=0)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As in Adam; not after warm-up."""
        if self.param_groups and self.phase is Phase.COMPRESSED:
            raise RuntimeError("parameters cannot join a QAdam after warm-up: their variance would be unknown")
        super().add_param_group(param_group)
        self._complete_group(self.param_groups[-1])

    @property
    def warmup_steps(self) -> int | Literal["auto"]:
        """T, in optimizer steps, or "auto"."""
        value: int | Literal["auto"] = self.param_groups[0]["warmup_steps"]
        return value

    @property
    def bagua_compat(self) -> bool:
        """Whether Bagua's deviations are reproduced."""
        return bool(self.param_groups[0]["bagua_compat"])

    @property
    def phase(self) -> Phase:
        """The phase of all groups."""
        return Phase.COMPRESSED if self.param_groups[0]["frozen_step"] else Phase.WARMUP

    @property
    def steps(self) -> int:
        """Steps made so far."""
        return max(int(group["steps"]) for group in self.param_groups)

    @property
    def zeroings(self) -> int:
        """Calls of `zero_grad` so far."""
        return self._calls["zero_grad"]

    @property
    def loads(self) -> int:
        """How often a state was loaded."""
        return self._calls["load"]

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As in Adam; needed before each backward that follows a step: after warm-up `.grad` holds momentum."""
        self._calls["zero_grad"] += 1
        self._folded.clear()
        super().zero_grad(set_to_none)

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One step of Adam in warm-up; afterwards takes up the momentum that `.grad` holds.

        Raises:
            RuntimeError: after warm-up, under a gradient scaler.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        # Asked after the closure: forward and backward may run inside, and the phase changes at a forward.
        self._warn_if_alone()
        if self.phase is Phase.COMPRESSED:
            self._refuse_loss_scaling()
            self._step_with_momentum()
        elif self.bagua_compat and self.warmup_steps != "auto" and self.steps + 1 == self.warmup_steps:
            self._step_with_old_momentum()
        else:
            # Without the hooks that torch wraps around each class's `step`: they belong to this one.
            with torch.no_grad():
                inspect.unwrap(torch.optim.Adam.step)(self)
        self._folded.clear()
        for group in self.param_groups:
            group["steps"] += 1
        return loss

    def momentum_of(self, parameter: Tensor) -> Tensor:
        """Adam's `exp_avg`; zeros where a parameter has not been stepped yet."""
        self._complete_state(parameter)
        momentum: Tensor = self.state[parameter]["exp_avg"]
        return momentum

    def variance_norm(self) -> float:
        """L1 norm of the bias-corrected variance."""
        total = 0.0
        for group in self.param_groups:
            correction = 1 - group["betas"][1] ** max(group["steps"], 1)
            for parameter in group["params"]:
                if parameter in self.state:
                    variance = self.state[parameter]["exp_avg_sq"]
                    total += float(variance.sum(dtype=torch.float64)) / correction
        return total

    def floors(self) -> dict[Tensor, float]:
        """The floor of each parameter that a gradient has reached."""
        found = {}
        for group in self.param_groups:
            for parameter in group["params"]:
                variance = self.state[parameter]["exp_avg_sq"] if parameter in self.state else torch.zeros(0)
                if (seen := variance[variance > 0]).numel():
                    found[parameter] = (
                        self._rescaling(parameter, group) * float(seen.median()) / _largest_ratio(*group["betas"]) ** 2
                    )
        return found

    def freeze(self, floors: Mapping[Tensor, float] | None = None) -> None:
        """Ends warm-up: the variance stays as it is from here on, but for the floor. Called by the algorithm.

        Args:
            floors: of this optimizer and of others that train the model; None takes `floors()`. A parameter that no gradient has
                reached gets the least of them.

        Raises:
            RuntimeError: if no gradient was different from zero.
        """
        floors = self.floors() if floors is None else floors
        if not floors:
            raise RuntimeError("warm-up ends and no gradient was different from zero: QAdam has no variance to go on with")
        least = min(floors.values())
        for group in self.param_groups:
            group["frozen_step"] = group["steps"]
            for parameter in group["params"]:
                self._complete_state(parameter)
                if not self.bagua_compat:
                    variance = self.state[parameter]["exp_avg_sq"]
                    variance.mul_(self._rescaling(parameter, group)).clamp_(min=floors.get(parameter, least))

    def note_folded(self, parameters: Iterable[Tensor]) -> None:
        """Called by the algorithm: in this backward `.grad` of these becomes the momentum."""
        self._folded.update(parameters)

    def attach(self) -> None:
        """Called by the algorithm that communicates for this optimizer.

        Raises:
            ValueError: for a parameter whose elements do not lie densely in memory.
        """
        for group in self.param_groups:
            for parameter in group["params"]:
                if torch.empty_like(parameter).stride() != parameter.stride():
                    raise ValueError(
                        "QAdam needs parameters whose elements lie densely in memory: got one of shape "
                        f"{tuple(parameter.shape)} and strides {parameter.stride()}"
                    )
        self._is_attached = True

    def detach(self) -> None:
        """Called by the algorithm when it ends."""
        self._is_attached = False

    @torch.no_grad()
    def _step_with_momentum(self) -> None:
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            steps, frozen = group["steps"] + 1, group["frozen_step"]
            lr, decoupled = float(group["lr"]), group["decoupled_weight_decay"]
            step_size = lr / (1 - beta1**steps)
            correction = math.sqrt(1 - beta2 ** (steps if self.bagua_compat else frozen))
            decay = 1 - lr * group["weight_decay"] if decoupled and not self.bagua_compat else 1.0
            stepped = [parameter for parameter in group["params"] if parameter.grad is not None]
            if not stepped:
                continue
            torch._foreach_add_([self.state[parameter]["step"] for parameter in stepped], 1)
            self._fold_others(group, [parameter for parameter in stepped if parameter not in self._folded])
            for (device, dtype), parameters in _by_kind(stepped):
                tensors = [(*self._addresses(parameter), parameter.numel()) for parameter in parameters]
                scalars = step_size, correction, group["eps"], decay
                run_kernel(kernels.qadam_step, device, DTYPES.index(dtype), tensors, *scalars, torch.get_num_threads())

    def _fold_others(self, group: dict[str, Any], parameters: list[Tensor]) -> None:
        """Folds gradients into momentum that no algorithm has folded: of parameters that are not in its model, or without one."""
        decay = 0.0 if group["decoupled_weight_decay"] or self.bagua_compat else group["weight_decay"]
        for (device, dtype), of_kind in _by_kind(parameters):
            tensors = [
                (gradient, momentum, address, parameter.numel())
                for parameter in of_kind
                for gradient, momentum, _, address in [self._addresses(parameter)]
            ]
            scalars = group["betas"][0], decay, torch.get_num_threads()
            run_kernel(kernels.qadam_fold, device, DTYPES.index(dtype), tensors, *scalars)

    def _addresses(self, parameter: Tensor) -> tuple[int, int, int, int]:
        """Of gradient, momentum, variance and parameter, which lie alike: kernels walk through memory, not through indices."""
        self._complete_state(parameter)
        gradient, state = parameter.grad, self.state[parameter]
        assert gradient is not None
        if gradient.stride() != parameter.stride():
            gradient = parameter.grad = torch.empty_like(parameter).copy_(gradient)
        return gradient.data_ptr(), state["exp_avg"].data_ptr(), state["exp_avg_sq"].data_ptr(), parameter.data_ptr()

    def _rescaling(self, parameter: Tensor, group: dict[str, Any]) -> float:
        """Steps without a gradient do not count for a parameter, but the correction of its variance is the group's."""
        own_steps, beta2 = _steps_of(self.state[parameter]), group["betas"][1]
        if self.bagua_compat or own_steps in (0, group["steps"]):
            return 1.0
        return float((1 - beta2 ** group["steps"]) / (1 - beta2**own_steps))

    @torch.no_grad()
    def _step_with_old_momentum(self) -> None:
        """Bagua's step T: its gradient is dropped, and the momentum of the step before is used again."""
        for group in self.param_groups:
            steps = group["steps"] + 1
            beta1, beta2 = group["betas"]
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._complete_state(parameter)
                    state = self.state[parameter]
                    state["step"] += 1
                    denominator = state["exp_avg_sq"].sqrt() / math.sqrt(1 - beta2**steps) + group["eps"]
                    parameter.addcdiv_(state["exp_avg"], denominator, value=-float(group["lr"]) / (1 - beta1**steps))

    def _complete_group(self, group: dict[str, Any]) -> None:
        beta1, beta2 = group["betas"]
        if beta1 * beta1 >= beta2:
            raise ValueError(f"QAdam needs beta1^2 < beta2, or m / sqrt(v) has no bound: got betas {beta1} and {beta2}")
        for name in ("amsgrad", "maximize"):
            if group.get(name):
                raise ValueError(f"QAdam does not take {name}")
        # One that joins during warm-up counts with the others.
        group.setdefault("steps", max((other.get("steps", 0) for other in self.param_groups), default=0))
        group.setdefault("frozen_step", 0)
        for name in ("warmup_steps", "bagua_compat"):
            if name in self.defaults:  # not yet while Adam's constructor runs
                group.setdefault(name, self.defaults[name])

    def _complete_state(self, parameter: Tensor) -> None:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.tensor(0.0)
            state["exp_avg"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
            state["exp_avg_sq"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
        for name in ("exp_avg", "exp_avg_sq"):
            if state[name].stride() != parameter.stride():  # loaded from, or made for, another memory format
                state[name] = torch.empty_like(parameter).copy_(state[name])

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
        # A gradient scaler asks for it: yes means that the optimizer is told what the scaler knows, and stepped in any case. In
        # warm-up the scaler shall unscale and skip by itself; after it, telling is how the scaler gives itself away.
        return bool(self.param_groups) and self.phase is Phase.COMPRESSED

    @_step_supports_amp_scaling.setter
    def _step_supports_amp_scaling(self, value: bool) -> None:
        """Adam's constructor sets it for `fused`."""

    def _refuse_loss_scaling(self) -> None:
        if getattr(self, "found_inf", None) is not None:
            delattr(self, "found_inf")  # by a handler of this error, perhaps, training goes on without the scaler
            raise RuntimeError(
                "QAdam cannot go on under a gradient scaler after warm-up: the momentum that travels would be scaled by a "
                "factor that changes. Train in bf16 or float32 (precision='bf16-mixed'), which need no scaler"
            )


QAdamOptimizer = QAdam
"""The name that Bagua gave it."""


def _steps_of(state: dict[str, Any]) -> float:
    return float(state["step"]) if "step" in state else 0.0


def _largest_ratio(beta1: float, beta2: float) -> float:
    """B, the largest |m| / sqrt(v) that Adam can reach."""
    return (1 - beta1) / math.sqrt((1 - beta2) * (1 - beta1 * beta1 / beta2))


def _has_fused(parameter: Tensor) -> bool:
    return parameter.device.type in ("cpu", "cuda") and parameter.is_floating_point()


def _by_kind(parameters: Iterable[Tensor]) -> Iterator[tuple[tuple[torch.device, torch.dtype], list[Tensor]]]:
    kinds: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for parameter in parameters:
        kinds.setdefault((parameter.device, parameter.dtype), []).append(parameter)
    return iter(kinds.items())
