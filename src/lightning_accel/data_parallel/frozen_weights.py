"""Refuses to train weights that DDP and the algorithms do not know of."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lightning_accel.algorithms.base import Context


class FrozenWeights:
    """The weights that needed no gradient when the model was wrapped; a gradient that one has later is this rank's own.

    Args:
        context: Replica whose weights these are.
    """

    def __init__(self, context: Context) -> None:
        self._name = context.communicator.name
        named = zip(context.parameters.names, context.parameters.tensors, strict=True)
        ignored = context.ddp.parameters_to_ignore
        self._weights = {name: weight for name, weight in named if not weight.requires_grad and name not in ignored}

    def refuse_gradients(self, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        """Raises RuntimeError if one of the weights has a gradient, and is among those of the optimizers, where any are given."""
        unfrozen = [name for name, weight in self._weights.items() if weight.requires_grad and weight.grad is not None]
        if unfrozen and optimizers:  # another model may share the weight, and train it by an optimizer of its own
            stepped = {id(weight) for optimizer in optimizers for group in optimizer.param_groups for weight in group["params"]}
            unfrozen = [name for name in unfrozen if id(self._weights[name]) in stepped]
        if unfrozen:
            raise RuntimeError(
                f"{self._name}: {unfrozen[0]!r} (one of {len(unfrozen)}) was frozen when the model was wrapped, and has a "
                "gradient now, which no other rank gets. Unwrap the model and wrap it anew, or call fit again, once unfrozen"
            )
