"""QAdam: Adam on mean gradients; from step T on, variance frozen, on the compressed mean of the ranks' momenta."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_accel.reference.collectives import Residuals, compressed_all_reduce, hierarchical_all_reduce


class QAdam:
    """All ranks' optimizer: what they hold is the same after each step, but for the residuals.

    Args:
        parameters: starting values; overwritten by each step.
        world_size: number of ranks.
        lr: learning rate.
        warmup_steps: T.
        betas: decay of momentum and variance.
        eps: added to the root of the variance.
        weight_decay: L2, or decoupled.
        decoupled: whether it is.
        codec: Q.
        error_feedback: whether residuals are kept.
        nodes: ranks of each node, where it is hierarchical.
        bagua: Bagua's deviations: the gradient of step T is dropped, the frozen variance's correction moves on, weight decay is
            lost after T, the variance has no floor.
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
        bagua: bool = False,
    ) -> None:
        self.parameters = list(parameters)
        self.world_size = world_size
        self.lr, self.warmup_steps, self.betas, self.eps = lr, warmup_steps, betas, eps
        self.weight_decay, self.decoupled = weight_decay, decoupled
        self.codec, self.nodes, self.bagua = codec, nodes, bagua
        self.steps = 0
        self.momenta = [torch.zeros_like(parameter) for parameter in parameters]
        self.variances = [torch.zeros_like(parameter) for parameter in parameters]
        num_workers = len(nodes) if nodes is not None else world_size
        self.residuals = [Residuals.zeros(num_workers, p.numel()) if error_feedback else None for p in parameters]

    def step(self, gradients: Sequence[Sequence[Tensor]]) -> None:
        """One step.

        Args:
            gradients: of each rank, of each parameter.
        """
        self.steps += 1
        for place, of_ranks in enumerate(zip(*gradients, strict=True)):
            if self.steps < self.warmup_steps or (self.steps == self.warmup_steps and not self.bagua):
                mean = of_ranks[0] / self.world_size
                for gradient in of_ranks[1:]:
                    mean = mean + gradient / self.world_size
                self._adam(place, mean)
            elif self.steps == self.warmup_steps:
                self._update(place, self.momenta[place], 1 - self.betas[1] ** self.steps)
            else:
                self._compressed(place, of_ranks)
        if self.steps == self.warmup_steps and not self.bagua:
            self._raise_to_floor()

    def _adam(self, place: int, gradient: Tensor) -> None:
        """By the operations of torch's own Adam, some of which fuse a product and a sum."""
        beta1, beta2 = self.betas
        if self.weight_decay and self.decoupled:
            self.parameters[place] = self.parameters[place] * (1 - self.lr * self.weight_decay)
        elif self.weight_decay:
            gradient = torch.add(gradient, self.parameters[place], alpha=self.weight_decay)
        self.momenta[place] = torch.lerp(self.momenta[place], gradient, 1 - beta1)
        self.variances[place] = (self.variances[place] * beta2).addcmul_(gradient, gradient, value=1 - beta2)
        self._update(place, self.momenta[place], 1 - beta2**self.steps)

    def _update(self, place: int, momentum: Tensor, correction: float) -> None:
        denominator = self.variances[place].sqrt() / math.sqrt(correction) + self.eps
        step_size = self.lr / (1 - self.betas[0] ** self.steps)
        self.parameters[place] = torch.addcdiv(self.parameters[place], momentum, denominator, value=-step_size)

    def _compressed(self, place: int, gradients: Sequence[Tensor]) -> None:
        beta1, beta2 = self.betas
        parameter, old = self.parameters[place], self.momenta[place]
        momenta = []
        for gradient in gradients:
            if self.weight_decay and not self.decoupled and not self.bagua:
                gradient = gradient + self.weight_decay * parameter
            momenta.append(beta1 * old + (1 - beta1) * gradient)
        if len(momenta) == 1:
            momentum = momenta[0]
        elif self.nodes is None:
            momentum = compressed_all_reduce(momenta, self.codec, self.world_size, self.residuals[place])
        else:
            momentum = hierarchical_all_reduce(momenta, self.nodes, self.codec, self.world_size, self.residuals[place])
        is_finite = momentum.isfinite()
        self.momenta[place] = torch.where(is_finite, momentum, old)
        correction = 1 - beta2 ** (self.steps if self.bagua else self.warmup_steps)
        # Correctly rounded, which torch's root of float32 is not on every CPU.
        root = self.variances[place].double().sqrt().to(parameter.dtype)
        denominator = root / math.sqrt(correction) + self.eps
        step_size = self.lr / (1 - beta1**self.steps)
        decay = 1 - self.lr * self.weight_decay if self.weight_decay and self.decoupled and not self.bagua else 1.0
        stepped = parameter * decay - (momentum / denominator) * step_size
        self.parameters[place] = torch.where(is_finite, stepped, parameter)  # what is poisoned stays as it was

    def _raise_to_floor(self) -> None:
        """No variance below median / B^2: B is the largest |m| / sqrt(v) that Adam can reach, by Cauchy and Schwarz."""
        beta1, beta2 = self.betas
        bound = (1 - beta1) / math.sqrt((1 - beta2) * (1 - beta1**2 / beta2))
        floors = [float(v[v > 0].median()) / bound**2 if (v > 0).any() else math.inf for v in self.variances]
        for place, floor in enumerate(floors):
            self.variances[place] = self.variances[place].clamp(min=min(floor, *floors) if floor == math.inf else floor)
