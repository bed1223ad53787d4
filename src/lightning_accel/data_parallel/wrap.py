"""Any algorithm in a plain PyTorch loop: `wrap` returns the DDP module, with the algorithm attached."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from datetime import timedelta
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from lightning_accel.algorithms import Algorithm, make_algorithm
from lightning_accel.algorithms.registry import check_keywords, reserve_keywords
from lightning_accel.background.statistics import Statistics
from lightning_accel.data_parallel.replica import Replica
from lightning_accel.data_parallel.same_model import check_same_model

DDP_ARGUMENTS = dict(list(inspect.signature(DistributedDataParallel).parameters.items())[1:])
"""Arguments of DistributedDataParallel but for the module."""


class AccelDataParallel(DistributedDataParallel):
    """torch's DistributedDataParallel with an algorithm attached; made by `wrap`, ended by `unwrap` or a `with` block.

    Either leaves equal weights on all ranks; but a `with` block that an exception ends leaves them as they are.

    A copy or a pickle of it has no algorithm: it is plain DDP.

    Attributes:
        replica: Replica that attaches the algorithm.
    """

    replica: Replica

    @property
    def statistics(self) -> Statistics:
        """What communication cost this rank so far."""
        return self.replica.statistics

    def __getstate__(self) -> dict[str, Any]:
        state: dict[str, Any] = super().__getstate__()  # type: ignore[no-untyped-call]
        replica = state.pop("replica", None)
        if replica is not None:
            hooks = state["_forward_pre_hooks"]
            state["_comm_hooks"] = []
            state.pop("buffer_hook", None)
            state["_forward_pre_hooks"] = type(hooks)((key, hook) for key, hook in hooks.items() if key not in replica.hook_ids)
        return state

    def __enter__(self) -> AccelDataParallel:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        try:
            if kind is None:  # an exception may be this rank's alone
                self.replica.consensus()
        finally:
            self.replica.close()


def wrap(
    model: nn.Module,
    optimizers: torch.optim.Optimizer | Iterable[torch.optim.Optimizer],
    algorithm: str | Algorithm = "gradient_allreduce",
    *,
    timeout: timedelta | None = None,
    **options: Any,
) -> AccelDataParallel:
    """Wraps a model for data-parallel training whose communication is chosen by one word. Collective.

    Training goes on as with DistributedDataParallel: `backward()`, `optimizer.step()`, gradient scalers, schedulers,
    `no_sync()` for accumulation, `state_dict()`.

    Args:
        model: Model on its device; its parameters become rank 0's.
        optimizers: One or several optimizers over the model's parameters; their steps tell the algorithm where a round ends.
        algorithm: Name of a registered algorithm, or an `Algorithm` object.
        timeout: Bound on each of the algorithm's collectives; None takes that of the process group.
        **options: Options of the algorithm, such as `codec`, and arguments of DistributedDataParallel, such as `bucket_cap_mb`.
            gradient_as_bucket_view is True unless given.

    Raises:
        ValueError: For an unknown algorithm or a wrong value of an option; on all ranks, if the model is not the same on all.
        TypeError: For a keyword that neither of both takes, a sharded model, or a model or an optimizer that is none.
        RuntimeError: Before `init_process_group`; or if the algorithm has no kernels for the device of a rank.

    Example:
        >>> with wrap(model, optimizer, "bytegrad") as model:  # doctest: +SKIP
        ...     model(batch).sum().backward()
        ...     optimizer.step()
    """
    if not isinstance(model, nn.Module) or isinstance(model, DistributedDataParallel):
        raise TypeError(f"wrap needs a model that is not wrapped yet: got {type(model).__name__}")
    optimizers = [optimizers] if isinstance(optimizers, torch.optim.Optimizer) else list(optimizers)
    for optimizer in optimizers:
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise TypeError(f"wrap needs the optimizer, or all of them, after the model: got {type(optimizer).__name__}")
    check_keywords("wrap", algorithm, options, {"DistributedDataParallel": DDP_ARGUMENTS})
    given = dict(options)
    ddp_kwargs = {name: options.pop(name) for name in list(options) if name in DDP_ARGUMENTS}
    chosen = make_algorithm(algorithm, options)
    check_whole(model)
    if not dist.is_initialized():
        raise RuntimeError("wrap needs the other ranks: call lightning_accel.init_process_group() before it, on each rank")
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    defaults = {"device_ids": [device] if device.type == "cuda" else None, "gradient_as_bucket_view": True}
    check_same_model(chosen.name, model, ddp_kwargs)
    ddp = AccelDataParallel(model, **{**defaults, **ddp_kwargs})
    ddp.replica = Replica(ddp, chosen, optimizers, timeout=timeout)
    given[chosen.unused_parameters_argument] = True
    written = ", ".join(f"{name}={value!r}" for name, value in given.items())
    ddp.replica.unused_parameters_remedy = f"wrap(model, optimizer, {algorithm!r}, {written})"
    return ddp


reserve_keywords("wrap", [name for name in inspect.signature(wrap).parameters if name != "options"])


def check_whole(model: nn.Module) -> None:
    """Refuses a model that was sharded.

    Raises:
        TypeError: For a module of torch's FSDP, and for parameters that are DTensors.
    """
    is_fsdp = any(type(module).__name__ == "FullyShardedDataParallel" for module in model.modules())
    sharded = [name for name, parameter in model.named_parameters() if hasattr(parameter, "device_mesh")]
    if is_fsdp or sharded:
        what = "a module in FullyShardedDataParallel" if is_fsdp else f"the sharded parameter {sharded[0]}"
        raise TypeError(f"the model must be whole on each rank, because algorithms work on DDP: got {what}. Leave sharding out")


def unwrap(ddp: AccelDataParallel) -> nn.Module:
    """Ends communication and returns the model, with equal weights on all ranks. Collective and idempotent.

    Raises:
        RuntimeError: After a `with` block that an exception has ended, if weights may differ between ranks.
        TypeError: For anything that `wrap` has not returned.
    """
    check_wrapped(ddp)
    try:
        ddp.replica.consensus()
    finally:
        ddp.replica.close()
    module: nn.Module = ddp.module
    return module


def check_wrapped(ddp: object) -> None:
    """Refuses a model that has no algorithm.

    Raises:
        TypeError: For anything that `wrap` has not returned.
    """
    if not isinstance(getattr(ddp, "replica", None), Replica):  # a compiled one has it too, a copy has not
        raise TypeError(f"what lightning_accel.wrap has returned is needed: got {type(ddp).__name__}")
