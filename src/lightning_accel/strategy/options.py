"""The keywords of both strategies: options of the registered algorithms, of checkpoints, and arguments of DDPStrategy and DDP.

None of them is listed here. An algorithm's dataclass names its options, with default and docstring, and so does that of
checkpoints; the signatures of the two base classes name the rest. Signature and docstring of a strategy are made when somebody
reads them, so that an algorithm that was registered later appears in LightningCLI and in `help`, too.
"""

from __future__ import annotations

import inspect
import re
import textwrap
from collections.abc import Callable, Mapping
from functools import partial, wraps
from types import MappingProxyType
from typing import Any, SupportsIndex, TypeVar

from torch.nn.parallel import DistributedDataParallel

from lightning_accel.algorithms import Algorithm, make_algorithm
from lightning_accel.algorithms.common.docstrings import parse_args
from lightning_accel.algorithms.registry import algorithm_options, check_keywords, reserve_keywords, type_hints
from lightning_accel.data_parallel.wrap import DDP_ARGUMENTS
from lightning_accel.strategy.checkpoints import CheckpointOptions

_REFUSED = {
    "ddp_comm_state": "the algorithm is the communication hook",
    "ddp_comm_hook": "the algorithm is the communication hook; write your own with lightning_accel.register_algorithm",
    "ddp_comm_wrapper": "the algorithm is the communication hook; choose its codec instead",
    "model_averaging_period": "averaging belongs to the algorithm",
}
"""Arguments of DDPStrategy that would take the algorithm's place, and why each is refused."""

_DEFAULTS = {"gradient_as_bucket_view": True}
"""Our defaults, where they are not DDP's."""

_DOCS = {
    "accelerator": "Accelerator that the Trainer or Fabric chooses by itself.",
    "parallel_devices": "Devices of this node, one a process.",
    "cluster_environment": "Source of ranks and addresses.",
    "checkpoint_io": "Writer and reader of checkpoints.",
    "precision_plugin": "Precision plugin of the Trainer.",
    "precision": "Precision plugin of Fabric.",
    "process_group_backend": '"gloo", "nccl" or another backend of torch.distributed.',
    "timeout": "Bound on each collective; a failed peer is noticed after it at the latest.",
    "start_method": '"popen", "spawn", "fork" or "forkserver".',
    "gradient_as_bucket_view": "Whether gradients lie in DDP's buckets, which spares a copy of them, in memory and in time. On "
    "by default, unlike in DDP; turn it off for code that calls `detach_()` on gradients.",
}
"""Descriptions of the base classes' arguments: DDPStrategy has none, and for one default DDP's is not true."""

_CHECKPOINT_OPTIONS = inspect.signature(CheckpointOptions).parameters

_DDP = {name: parameter for name, parameter in DDP_ARGUMENTS.items() if name != "device_ids"}

_Class = TypeVar("_Class", bound=type)


def split_keywords(
    base: Callable[..., None], algorithm: str | Algorithm, keywords: Mapping[str, Any]
) -> tuple[Algorithm, CheckpointOptions, dict[str, Any]]:
    """Makes the algorithm and the options of checkpoints, and returns them with the keywords of the base class and DDP.

    Args:
        base: Constructor of the base class.
        algorithm: Name of a registered algorithm, or an `Algorithm` object.
        keywords: Keywords of the strategy's constructor; an option that is None counts as not given.

    Raises:
        ValueError: For an argument that would take the algorithm's place, an unknown algorithm, or an option's wrong value.
        TypeError: For an unknown keyword, with the valid ones.
    """
    for name, reason in _REFUSED.items():
        if keywords.get(name) is not None:
            raise ValueError(f"AccelStrategy does not take {name}: {reason}")
    given = {name: value for name, value in keywords.items() if name not in _REFUSED}
    options = algorithm_options()
    others = {"DDPStrategy": _arguments(base), "DistributedDataParallel": _DDP, "checkpoints": _CHECKPOINT_OPTIONS}
    check_keywords("AccelStrategy", algorithm, given, others)
    algorithm_kwargs = {name: value for name, value in given.items() if name in options and value is not None}
    checkpoint_kwargs = {name: value for name, value in given.items() if name in _CHECKPOINT_OPTIONS}
    base_kwargs = {name: value for name, value in given.items() if name not in {*options, *_CHECKPOINT_OPTIONS}}
    return make_algorithm(algorithm, algorithm_kwargs), CheckpointOptions(**checkpoint_kwargs), _DEFAULTS | base_kwargs


def show_keywords(cls: _Class) -> _Class:
    """Gives a strategy's class a signature and a docstring that name every keyword.

    Args:
        cls: Class whose bases are `TrainerStrategy` or `FabricStrategy`, and a root's DDPStrategy.

    Raises:
        ValueError: If a registered algorithm has an option of the name of an argument of DDPStrategy.
    """
    mixin, ddp_strategy = cls.__bases__
    constructor, base = mixin.__init__, ddp_strategy.__init__  # type: ignore[misc]
    reserve_keywords("DDPStrategy", ["algorithm", *_REFUSED, *_CHECKPOINT_OPTIONS, *_arguments(base)])

    @wraps(constructor)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:  # noqa: N807 - jsonargparse takes functions, no descriptors
        constructor(self, *args, **kwargs)

    signature = _LiveSignature(constructor, base)
    __init__.__signature__ = signature  # type: ignore[attr-defined]
    cls.__init__ = __init__  # type: ignore[misc]
    cls.__doc__ = _LiveDocstring(mixin.__doc__ or "", signature)
    return cls


class _LiveSignature(inspect.Signature):
    """The signature of a strategy's constructor, as it is when somebody reads it."""

    __slots__ = ("_base", "_constructor")

    def __init__(self, constructor: Callable[..., None], base: Callable[..., None]) -> None:
        super().__init__()
        self._constructor, self._base = constructor, base

    @property
    def parameters(self) -> MappingProxyType[str, inspect.Parameter]:
        keyword_only = partial(inspect.Parameter, kind=inspect.Parameter.KEYWORD_ONLY)
        parameters = [*inspect.signature(self._constructor).parameters.values()][:-1]  # all but **kwargs
        hints = type_hints(self._base) | type_hints(CheckpointOptions) | type_hints(self._constructor)
        for name, option in algorithm_options().items():
            parameters.append(keyword_only(name, default=None, annotation=option.annotation))
        for name, parameter in (_CHECKPOINT_OPTIONS | _arguments(self._base) | _DDP).items():
            default = _DEFAULTS.get(name, parameter.default)
            parameters.append(keyword_only(name, default=default, annotation=parameter.annotation))
        typed = (parameter.replace(annotation=hints.get(parameter.name, parameter.annotation)) for parameter in parameters)
        return MappingProxyType({parameter.name: parameter for parameter in typed})

    def replace(self, **changes: Any) -> inspect.Signature:  # type: ignore[override]
        return inspect.Signature([*self.parameters.values()]).replace(**changes)


class _LiveDocstring(str):
    """A class's docstring whose entry `**kwargs` gives way to one for each keyword, as they are when somebody reads it."""

    def __new__(cls, text: str, signature: _LiveSignature) -> _LiveDocstring:
        docstring = super().__new__(cls, inspect.cleandoc(text))
        docstring._signature = signature
        return docstring

    _signature: _LiveSignature

    def __get__(self, instance: object, owner: type | None = None) -> str:
        docs = parse_args(DistributedDataParallel.__doc__) | _DOCS | parse_args(CheckpointOptions.__doc__)
        docs |= {name: option.doc for name, option in algorithm_options().items()}
        entries = [
            textwrap.fill(
                f"{name}: {docs.get(name, 'See DDPStrategy and DistributedDataParallel.')}",
                120,
                initial_indent=" " * 4,
                subsequent_indent=" " * 8,
            )
            for name in [*self._signature.parameters][2:]
        ]
        return re.sub(r"^ +\*\*kwargs:.*\n(?:        .*\n)*", lambda _: "\n".join(entries) + "\n", self, flags=re.MULTILINE)

    def expandtabs(self, tabsize: SupportsIndex = 8) -> str:
        return self.__get__(None).expandtabs(tabsize)  # the way of pydoc, which finds this object in the class's dict


def _arguments(constructor: Callable[..., None]) -> dict[str, inspect.Parameter]:
    """Returns what can be given by name, but for what is refused."""
    parameters = inspect.signature(constructor).parameters.items()
    return {name: value for name, value in parameters if name not in ("self", "kwargs", *_REFUSED)}
