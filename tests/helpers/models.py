"""Models whose gradients are given, so that what comes out of a backward can be compared to the bit."""

from collections.abc import Sequence

import torch

from helpers.tensors import DTYPES, SIZES, assert_same_bits, awkward, normal

LARGE_NUMEL = 300_007
"""Of float32: larger than a bucket of one megabyte."""


class _Given(torch.autograd.Function):
    @staticmethod
    def forward(context, parameter, gradient):
        context.save_for_backward(gradient)
        context.device = parameter.device
        return torch.zeros((), dtype=torch.float64)

    @staticmethod
    def backward(context, _):
        (gradient,) = context.saved_tensors
        return gradient.to(context.device, copy=True) if context.needs_input_grad[0] else None, None


class GivenGradients(torch.nn.Module):
    """The gradient of each parameter is what is given to the forward, to the bit: no product may touch a NaN's payload.

    The model may be moved to a GPU, and gradients be given there or on the CPU.

    Args:
        tensors: parameters start as zeros of their shapes and dtypes.
        tied: pairs of places: the second is the first one's parameter.
        frozen: places of parameters that need no gradient.
    """

    def __init__(self, tensors: Sequence[torch.Tensor], tied: Sequence[tuple[int, int]] = (), frozen: Sequence[int] = ()) -> None:
        super().__init__()
        parameters = [torch.nn.Parameter(torch.zeros_like(t), requires_grad=k not in frozen) for k, t in enumerate(tensors)]
        for first, second in tied:
            parameters[second] = parameters[first]
        for place, parameter in enumerate(parameters):
            self.register_parameter(f"p{place}", parameter)
        self.numel = len(parameters)

    def forward(self, gradients: Sequence[torch.Tensor | None]) -> torch.Tensor:
        """A loss; parameters whose gradient is None stay out of it."""
        terms = [_Given.apply(getattr(self, f"p{k}"), gradient) for k, gradient in enumerate(gradients) if gradient is not None]
        return torch.stack(terms).sum()


def all_kinds(rank: int, step: int = 0) -> list[torch.Tensor]:
    """One rank's gradients: every dtype, every size, every awkward value, and one that is larger than a bucket."""
    gradients = []
    for dtype in DTYPES:
        gradients += [normal(numel, dtype, seed=1000 * step + 10 * rank + 7) for numel in SIZES]
        gradients.append(awkward(dtype, seed=rank + step).roll(700 * rank))
    gradients.append(normal(LARGE_NUMEL, torch.float32, seed=1000 * step + 10 * rank + 8))
    return gradients


def few_kinds(rank: int, step: int = 0) -> list[torch.Tensor]:
    """The same, small: three parameters of float32 and one of float16."""
    seed = 1000 * step + 10 * rank
    sizes = (700, 40_000, 33)
    return [*(normal(n, torch.float32, seed=seed + k) for k, n in enumerate(sizes)), normal(1500, torch.float16, seed=seed + 9)]


def assert_gradients(module: torch.nn.Module, expected: Sequence[torch.Tensor | None], what: object) -> None:
    """Fails unless each parameter's gradient has the expected bits; None expects none."""
    parameters = dict(module.named_parameters())
    assert len(parameters) == len(expected)
    for (name, parameter), wanted in zip(parameters.items(), expected, strict=True):
        if wanted is None:
            assert parameter.grad is None, f"{what}, {name}: a gradient where none is expected"
        else:
            assert parameter.grad is not None, f"{what}, {name}: no gradient"
            assert_same_bits(parameter.grad, wanted, f"{what}, {name}")
