"""When backward adds to a parameter's `.grad`."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Container, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch.autograd.graph import get_gradient_edge


class GradientWatch:
    """Tells listeners before backward adds to a parameter's `.grad`, and remembers to whose it has added.

    DDP hands over a bucket after backward has added to `.grad`. Whether it added to what the last message had delivered, or
    `.grad` was zeroed in between, can be seen only before.

    Args:
        parameters: Parameters of the model; those that need no gradient are not watched.
    """

    def __init__(self, parameters: Sequence[torch.Tensor]) -> None:
        self._added: set[int] = set()
        self._listeners: list[tuple[Container[int], weakref.WeakMethod[Callable[[int], None]]]] = []
        # DDP keeps these nodes alive, and each keeps its hook. So the hook must not keep what keeps DDP: listeners are weak.
        self._handles: list[Any] = [
            get_gradient_edge(parameter).node.register_prehook(partial(self._before_adding, place))
            for place, parameter in enumerate(parameters)
            if parameter.requires_grad
        ]

    def listen(self, places: Container[int], listener: Callable[[int], None]) -> None:
        """Calls a method with the place of each parameter before backward adds to its `.grad`.

        Args:
            places: Places of the parameters that matter; may change at any time.
            listener: Bound method; held weakly.
        """
        self._listeners.append((places, weakref.WeakMethod(listener)))

    def has_added(self, place: int) -> bool:
        """Tells whether backward has added to a parameter's `.grad` since its last message."""
        return place in self._added

    def note_message(self, places: Iterable[int]) -> None:
        """Takes note that parameters have their message."""
        self._added.difference_update(places)

    def close(self) -> None:
        """Stops watching. Idempotent."""
        for handle in self._handles:
            handle.remove()

    def _before_adding(self, place: int, gradients: tuple[torch.Tensor, ...]) -> None:
        for places, reference in self._listeners:
            if place in places and (listener := reference()) is not None:
                listener(place)
        self._added.add(place)
