"""ByteGrad: g <- Q(1/n sum_r Q(g_r)) for each block of each parameter, with or without error feedback."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import Tensor, zeros_like

from lightning_accel.reference.collectives import Residuals, compressed_all_reduce, hierarchical_all_reduce


def bytegrad(
    gradients: Sequence[Sequence[Tensor]],
    codec: str = "int8",
    *,
    nodes: Sequence[Sequence[int]] | None = None,
    average: bool = True,
    residuals: Sequence[Residuals] | None = None,
) -> list[Tensor]:
    """Returns what every rank holds as gradients, by parameter. A single rank keeps its own.

    Args:
        gradients: Gradients of each rank, of each parameter.
        codec: Q.
        nodes: Ranks of each node where it is hierarchical; None is flat.
        average: Whether gradients are averaged; False leaves the sum.
        residuals: Residuals of each parameter; overwritten. None is no error feedback.
    """
    if len(gradients) == 1:
        return list(gradients[0])
    divisor = len(gradients) if average else 1
    all_residuals = residuals if residuals is not None else [None] * len(gradients[0])
    by_parameter = zip(zip(*gradients, strict=True), all_residuals, strict=True)
    if nodes is None:
        return [compressed_all_reduce(tensors, codec, divisor, kept) for tensors, kept in by_parameter]
    return [hierarchical_all_reduce(tensors, nodes, codec, divisor, kept) for tensors, kept in by_parameter]


class Gradients:
    """The `.grad` of all ranks under DDP and ByteGrad with error feedback, over any sequence of backwards, zeroings and steps.

    DDP adds a backward's gradients to `.grad`, sends what is there, and replaces it by the result. A parameter's message starts
    from the residuals that its last message has left if that one's result is still in `.grad`, and from those of the last step
    otherwise: what was zeroed before a step had used it was sent in vain. A step uses every gradient that is not None, of zeros
    too.

    Args:
        parameters: Parameters, for their shapes and dtypes.
        world_size: Number of ranks.
        codec: Q.
        nodes: Ranks of each node where it is hierarchical; None is flat.
        views: Whether `.grad` lies in DDP's buckets. Then DDP sends, and replaces, what parameters hold that no rank has used.

    Attributes:
        of_ranks: Gradients of each rank, of each parameter; None where there is none.
    """

    def __init__(
        self,
        parameters: Sequence[Tensor],
        world_size: int,
        codec: str,
        *,
        nodes: Sequence[Sequence[int]] | None = None,
        views: bool = False,
    ) -> None:
        self.of_ranks: list[list[Tensor | None]] = [[None] * len(parameters) for _ in range(world_size)]
        self._parameters = parameters
        self._codec, self._nodes, self._views = codec, nodes, views
        num_workers = len(nodes) if nodes is not None else world_size
        self._committed = [Residuals.zeros(num_workers, parameter.numel()) for parameter in parameters]
        self._pending: list[Residuals | None] = [None] * len(parameters)
        self._is_zeroed = [False] * len(parameters)
        self._is_used = [False] * len(parameters)

    def backward(self, gradients: Sequence[Sequence[Tensor | None]], *, synchronised: bool = True) -> None:
        """Adds gradients, and reduces what is there if it is synchronised.

        Args:
            gradients: Gradients of each rank, of each parameter; None where its loss does not use the parameter.
            synchronised: Whether it is outside of `no_sync`.
        """
        for own, new in zip(self.of_ranks, gradients, strict=True):
            for place, gradient in enumerate(new):
                if gradient is not None:
                    old = own[place]
                    own[place] = gradient if old is None else old + gradient
                    self._is_used[place] = True
                    self._drop_if_zeroed(place)
        if synchronised:
            for place in range(len(self._parameters)):
                self._reduce(place)
                self._is_used[place] = False

    def zero(self, places: Iterable[int], *, set_to_none: bool = True) -> None:
        """Zeroes gradients, as `zero_grad` does."""
        for place in places:
            self._is_zeroed[place] = True
            if set_to_none:
                self._pending[place] = None
            for own in self.of_ranks:
                if (old := own[place]) is not None:
                    own[place] = None if set_to_none else zeros_like(old)

    def step(self, places: Iterable[int]) -> None:
        """Makes the step of an optimizer of some parameters, on all ranks; those without a gradient are left out."""
        for place in places:
            if (pending := self._pending[place]) is not None:
                self._committed[place], self._pending[place] = pending, None

    def _drop_if_zeroed(self, place: int) -> None:
        if self._is_zeroed[place]:
            self._pending[place], self._is_zeroed[place] = None, False

    def _reduce(self, place: int) -> None:
        self._drop_if_zeroed(place)
        held = [own[place] for own in self.of_ranks]
        if not self._is_used[place] and (not self._views or all(one is None for one in held)):
            return  # DDP leaves `.grad` as it is
        residuals = (self._pending[place] or self._committed[place]).copy()
        sent = [zeros_like(self._parameters[place]) if one is None else one for one in held]
        (result,) = bytegrad([[one] for one in sent], self._codec, nodes=self._nodes, residuals=[residuals])
        self._pending[place] = residuals
        for own in self.of_ranks:
            own[place] = result
