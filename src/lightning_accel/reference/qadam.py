"""QAdam: Adam on mean gradients; from step T on, variance frozen, on the compressed mean of the ranks' momenta."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_accel.reference.collectives import Residuals, compressed_all_reduce, hierarchical_all_reduce


class QAdam:
    """The optimizer of all ranks: after each step they hold the same, except for the residuals.

    Args:
        parameters: Starting values; `self.parameters` holds those after the last step.
        world_size: Number of ranks.
        lr: Learning rate.
        warmup_steps: T.
        betas: Decay rates of momentum and variance.
        eps: Term added to the root of the variance.
        weight_decay: L2 penalty, or decoupled weight decay.
        decoupled: Whether weight decay is decoupled.
        codec: Q.
        error_feedback: Whether residuals are kept.
        nodes: Ranks of each node where it is hierarchical; None is flat.
    """

    def __init__(
        self,
        parameters: Sequence[Tensor],
        world_size: int,
        *,
        lr: float = 1e-3,
        warmup_steps: int,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        decoupled: bool = False,
        codec: str = "int8",
        error_feedback: bool = True,
        nodes: Sequence[Sequence[int]] | None = None,
    ) -> None:
        self.parameters = list(parameters)
        self.world_size = world_size
        self.lr, self.warmup_steps, self.betas, self.eps = lr, warmup_steps, betas, eps
        self.weight_decay, self.decoupled = weight_decay, decoupled
        self.codec, self.nodes = codec, nodes
        self.steps = 0
        self.momenta = [torch.zeros_like(parameter) for parameter in parameters]
        self.variances = [torch.zeros_like(parameter) for parameter in parameters]
        num_workers = len(nodes) if nodes is not None else world_size
        self.residuals = [Residuals.zeros(num_workers, p.numel()) if error_feedback else None for p in parameters]

    def step(self, *backwards: Sequence[Sequence[Tensor]]) -> None:
        """Makes one step after one backward, or several that are each synchronised.

        DDP adds a backward's gradients to what the one before has left in `.grad`, and sends the sum again.

        Args:
            backwards: For each backward, gradients of each rank, of each parameter.
        """
        self.steps += 1
        is_warmup = self.steps <= self.warmup_steps
        for place in range(len(self.parameters)):
            held: Tensor | None = None
            for gradients in backwards:
                of_ranks = [own[place] if held is None else held + own[place] for own in gradients]
                if not is_warmup:
                    of_ranks = self._fold(place, of_ranks, held)
                held = self._mean(of_ranks, place if not is_warmup else None)
            assert held is not None
            if is_warmup:
                self._warmup_step(place, held)
            else:
                self._compressed_step(place, held)
        if self.steps == self.warmup_steps:
            self._raise_to_floor()

    def _fold(self, place: int, gradients: Sequence[Tensor], momentum: Tensor | None) -> list[Tensor]:
        """Returns each rank's momentum: onto the last step's, or onto that of the last message, which the gradients contain."""
        beta1 = self.betas[0]
        if momentum is not None:
            return [beta1 * momentum + (1 - beta1) * gradient for gradient in gradients]
        if self.weight_decay and not self.decoupled:
            gradients = [gradient + self.weight_decay * self.parameters[place] for gradient in gradients]
        return [beta1 * self.momenta[place] + (1 - beta1) * gradient for gradient in gradients]

    def _mean(self, tensors: Sequence[Tensor], coded: int | None) -> Tensor:
        """Returns the ranks' mean, coded with the residuals of a parameter, or uncompressed."""
        if len(tensors) == 1:
            return tensors[0]
        codec, residuals = ("none", None) if coded is None else (self.codec, self.residuals[coded])
        if self.nodes is None:
            return compressed_all_reduce(tensors, codec, self.world_size, residuals)
        return hierarchical_all_reduce(tensors, self.nodes, codec, self.world_size, residuals)

    def _warmup_step(self, place: int, gradient: Tensor) -> None:
        """Steps with the operations of torch's own Adam, some of which fuse a product and a sum."""
        beta1, beta2 = self.betas
        if self.weight_decay and self.decoupled:
            self.parameters[place] = self.parameters[place] * (1 - self.lr * self.weight_decay)
        elif self.weight_decay:
            gradient = torch.add(gradient, self.parameters[place], alpha=self.weight_decay)
        self.momenta[place] = torch.lerp(self.momenta[place], gradient, 1 - beta1)
        self.variances[place] = (self.variances[place] * beta2).addcmul_(gradient, gradient, value=1 - beta2)
        self._update(place)

    def _update(self, place: int) -> None:
        denominator = self.variances[place].sqrt() / math.sqrt(1 - self.betas[1] ** self.steps) + self.eps
        step_size = self.lr / (1 - self.betas[0] ** self.steps)
        self.parameters[place] = torch.addcdiv(self.parameters[place], self.momenta[place], denominator, value=-step_size)

    def _correction_steps(self) -> int:
        """Returns the number of steps by which the frozen variance is bias-corrected."""
        return self.warmup_steps

    def _compressed_step(self, place: int, momentum: Tensor) -> None:
        beta1, beta2 = self.betas
        parameter, old = self.parameters[place], self.momenta[place]
        is_finite = momentum.isfinite()
        self.momenta[place] = torch.where(is_finite, momentum, old)
        correction = 1 - beta2 ** self._correction_steps()
        # Correctly rounded, which torch's root of float32 is not on every CPU.
        root = self.variances[place].double().sqrt().to(parameter.dtype)
        denominator = root / math.sqrt(correction) + self.eps
        step_size = self.lr / (1 - beta1**self.steps)
        decay = 1 - self.lr * self.weight_decay if self.decoupled else 1.0
        stepped = parameter * decay - (momentum / denominator) * step_size
        self.parameters[place] = torch.where(is_finite, stepped, parameter)  # where it is not finite, nothing changes

    def _raise_to_floor(self) -> None:
        """Raises variances to median / B^2; B is the largest |m| / sqrt(v) that Adam can reach, by Cauchy and Schwarz."""
        beta1, beta2 = self.betas
        bound = (1 - beta1) / math.sqrt((1 - beta2) * (1 - beta1**2 / beta2))
        floors = [float(v[v > 0].median()) / bound**2 if (v > 0).any() else math.inf for v in self.variances]
        for place, floor in enumerate(floors):
            self.variances[place] = self.variances[place].clamp(min=min(floor, *floors) if floor == math.inf else floor)
