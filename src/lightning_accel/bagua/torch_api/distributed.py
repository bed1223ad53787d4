"""`module.with_bagua(optimizers, algorithm)`: trains a module in parallel without wrapping it.

A DDP instance beside the module wraps a stand-in, which has the module's parameters, buffers, children and forward; the
module's `forward` calls that instance:

    module(x) -> the module's hooks -> ddp(x) -> stand-in(x) -> the original forward

So hooks run once, `state_dict()` keeps its names, and nothing calls itself in a circle.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.utils._pytree import tree_map_only

import lightning_accel.algorithms
from lightning_accel.bagua.torch_api.algorithms.base import Algorithm, unwrap_algorithm
from lightning_accel.data_parallel.wrap import unwrap, wrap

_ATTACHED = ("forward", "__getstate__", "bagua_ddp", "bagua_algorithm", "bagua_optimizers")
"""Attributes that `with_bagua` adds to an instance."""


class _StandIn(nn.Module):
    """A module for DDP to wrap in place of another: it has the other's parameters, buffers, children, names and forward."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self._parameters, self._buffers, self._modules = module._parameters, module._buffers, module._modules
        self._non_persistent_buffers_set = module._non_persistent_buffers_set
        ignored = getattr(module, "_bagua_params_and_buffers_to_ignore", ())
        self._ddp_params_and_buffers_to_ignore = [*ignored, *getattr(module, "_ddp_params_and_buffers_to_ignore", ())]
        self.forward = module.forward
        self.replaced = {name: module.__dict__[name] for name in _ATTACHED if name in module.__dict__}


def with_bagua(
    self: nn.Module,
    optimizers: list[torch.optim.Optimizer],
    algorithm: Algorithm | lightning_accel.algorithms.Algorithm | str,
    process_group: dist.ProcessGroup | None = None,
    do_flatten: bool = True,
    *,
    find_unused_parameters: bool = False,
) -> nn.Module:
    """Trains this module in parallel from now on; a method of `nn.Module`. Collective.

    Parameters, buffers and the optimizers' states become rank 0's. A second call changes the algorithm. The module gets
    `bagua_ddp` (see `lightning_accel.wrap`), `bagua_algorithm` and `bagua_optimizers`; a copy or a pickle of it has none of
    them, and is an ordinary module.

    Nothing communicates without gradients (`torch.no_grad()`): one rank may evaluate alone.

    Args:
        self: Module on its device.
        optimizers: Optimizers of its parameters.
        algorithm: Algorithm of `torch_api.algorithms`, or one of `lightning_accel`, or its name.
        process_group: Group whose ranks take part; None is the default group.
        do_flatten: Whether gradients lie in the buckets that are sent.
        find_unused_parameters: Whether some parameters may get no gradient in some steps. Bagua has this option in its
            DistributedDataParallel only.

    Returns:
        The module itself.

    Raises:
        TypeError: If the algorithm was written for Bagua itself.
        ValueError: If QAdam's own optimizer is not among the optimizers.
    """
    optimizers = list(optimizers)
    accel_algorithm = unwrap_algorithm(algorithm, optimizers)
    if "bagua_ddp" in self.__dict__:
        _detach(self)
    broadcast_optimizer_states(optimizers, process_group)
    stand_in = _StandIn(self)
    ddp = wrap(
        stand_in,
        optimizers,
        accel_algorithm,
        process_group=process_group,
        gradient_as_bucket_view=do_flatten,
        find_unused_parameters=find_unused_parameters,
    )

    def forward(*args: Any, **kwargs: Any) -> Any:
        return ddp(*args, **kwargs) if torch.is_grad_enabled() else stand_in.forward(*args, **kwargs)

    def ordinary_state() -> dict[str, Any]:
        getstate = getattr(type(self), "__getstate__", None)  # Python 3.10's object has none
        state = self.__dict__ if getstate is None else getstate(self)
        return {**{name: value for name, value in state.items() if name not in _ATTACHED}, **stand_in.replaced}

    attached = (forward, ordinary_state, ddp, algorithm, optimizers)
    # Not by assignment, which would make the DDP instance a child of the module.
    self.__dict__.update(zip(_ATTACHED, attached, strict=True))
    return self


nn.Module.with_bagua = with_bagua  # type: ignore[attr-defined]


def broadcast_optimizer_states(optimizers: list[torch.optim.Optimizer], process_group: dist.ProcessGroup | None) -> None:
    """Gives optimizers that have a state on rank 0, such as one from a checkpoint, the same state on all ranks. Collective."""
    states: list[Any] = [None] * len(optimizers)
    if dist.get_rank(process_group) == 0:
        for place, optimizer in enumerate(optimizers):
            if optimizer.state:
                states[place] = tree_map_only(torch.Tensor, torch.Tensor.cpu, optimizer.state_dict())
    dist.broadcast_object_list(states, group=process_group, group_src=0)
    for optimizer, state in zip(optimizers, states, strict=True):
        if state is not None and dist.get_rank(process_group) != 0:
            optimizer.load_state_dict(state)


def _detach(module: nn.Module) -> None:
    stand_in = unwrap(module.__dict__["bagua_ddp"])
    assert isinstance(stand_in, _StandIn)
    for name in _ATTACHED:
        del module.__dict__[name]
    module.__dict__.update(stand_in.replaced)
