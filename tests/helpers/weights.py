"""Training whose gradients depend on the weights, on ranks and simulated in one process, to be compared to the bit."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from helpers.tensors import assert_same_bits
from helpers.training import Training
from lightning_accel import Algorithm

SGD = partial(torch.optim.SGD, lr=0.05, momentum=0.5)
"""With state, and gradients that are scaled: a wrong order of step and exchange shows."""


class Mixed(torch.nn.Module):
    """Weights of four dtypes, a tied and a frozen one, one without gradient, one in channels_last, and BatchNorm's buffers."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)

        def weight(*shape: int, dtype: torch.dtype = torch.float32) -> torch.nn.Parameter:
            return torch.nn.Parameter(torch.randn(shape, generator=generator).to(dtype))

        self.first = weight(1201)
        self.frozen = weight(5).requires_grad_(False)
        self.wide = weight(7, dtype=torch.float64)
        self.brain = weight(600, dtype=torch.bfloat16)
        self.narrow = weight(33, dtype=torch.float16)
        self.empty = weight(0)
        self.tied = self.first
        self.image = torch.nn.Parameter(weight(3, 2, 5, 5).detach().to(memory_format=torch.channels_last))
        self.norm = torch.nn.BatchNorm1d(4)
        self.register_buffer("counts", torch.zeros(2, dtype=torch.bool))
        self.unused = weight(3)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """A loss of inputs of shape (8, 4)."""
        factor = inputs.mean()
        terms = [(weight.float() * factor - 0.3).pow(2).sum() for weight in (self.first, self.wide, self.brain, self.narrow)]
        terms += [self.tied[:9].sum() * inputs[0, 0], (self.image * inputs[1, 1]).pow(2).sum(), self.frozen.sum()]
        terms += [(self.norm(inputs) - inputs).pow(2).sum(), self.empty.sum()]
        return torch.stack(terms).sum() * 0.1


class WithoutHalf(Mixed):
    """The same without float16, of which gradient scalers take no gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.narrow = torch.nn.Parameter(self.narrow.detach().float())


def inputs_of(rank: int, round_: int, micro_batch: int = 0) -> torch.Tensor:
    """What a rank trains on."""
    return torch.randn(8, 4, generator=torch.Generator().manual_seed(10_000 * rank + 10 * round_ + micro_batch + 1)) + 0.1 * rank


def optimizer_of(model: torch.nn.Module) -> torch.optim.Optimizer:
    """Makes the optimizer of the model's parameters that need a gradient."""
    return SGD([p for p in model.parameters() if p.requires_grad])


def trainable(model: torch.nn.Module) -> list[torch.Tensor]:
    """Its weights that need a gradient, tied ones once."""
    return [parameter.detach() for parameter in model.parameters() if parameter.requires_grad]


def set_weights(model: torch.nn.Module, weights: Sequence[torch.Tensor]) -> None:
    """Overwrites what `trainable` gives."""
    for target, value in zip(trainable(model), weights, strict=True):
        target.copy_(value)


class Simulation:
    """All ranks' models in one process, without DDP.

    They compute on the ranks' device, for a GPU's forward and backward round otherwise than a CPU's; `weights` are on the CPU,
    where the specifications work.
    """

    def __init__(self, world_size: int, model: Callable[[], torch.nn.Module] = Mixed, device: str = "cpu") -> None:
        self.device = device
        self.models = [model().to(device) for _ in range(world_size)]
        self.optimizers = [optimizer_of(model) for model in self.models]

    @property
    def weights(self) -> list[list[torch.Tensor]]:
        """Of each rank; copies."""
        return [[tensor.to("cpu", copy=True) for tensor in trainable(model)] for model in self.models]

    def set_weights(self, weights: Sequence[Sequence[torch.Tensor]]) -> None:
        """Of each rank."""
        for model, own in zip(self.models, weights, strict=True):
            set_weights(model, own)

    def backward(self, round_: int, micro_batch: int = 0) -> None:
        """Adds to the gradients of each rank."""
        for rank, model in enumerate(self.models):
            model(inputs_of(rank, round_, micro_batch).to(self.device)).backward()

    def step(self, skipping: int | None = None) -> None:
        """One optimizer step on each rank, but for one."""
        for rank, optimizer in enumerate(self.optimizers):
            if rank != skipping:
                optimizer.step()
            optimizer.zero_grad()


def mixed_training(
    algorithm: Algorithm, nodes: Sequence[Sequence[int]] | None = None, *, model: type = Mixed, **options: Any
) -> Training:
    """One rank's part of what `Simulation` computes, through DDP and an algorithm."""
    return Training(model(), algorithm, SGD, nodes=nodes, find_unused_parameters=True, **options)


def check_estimates(training: Training) -> None:
    """Checks the estimates of a ring's ranks, bitwise: w[r] == R[r-1] == L[r+1]. Collective."""
    peers = training.replica.algorithm.inter_node
    n = peers.world_size
    for ring in training.replica.algorithm.rings:
        gathered = []
        for estimate in (ring.own, ring.left, ring.right):
            gathered.append([torch.empty_like(estimate) for _ in range(n)])
            dist.all_gather(gathered[-1], estimate, group=peers.process_group)
        own, left, right = gathered
        for r in range(n):
            assert_same_bits(right[(r - 1) % n], own[r], f"R of the rank left of {r}")
            assert_same_bits(left[(r + 1) % n], own[r], f"L of the rank right of {r}")
