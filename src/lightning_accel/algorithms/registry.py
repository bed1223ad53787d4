"""Algorithms by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from typing import TYPE_CHECKING, Any, TypeVar

from lightning_accel.algorithms.base import Algorithm
from lightning_accel.algorithms.common.option_checks import nearest

if TYPE_CHECKING:
    from torch._C._distributed_c10d import GradBucket as GradBucket
else:
    pass  # DDP compares a hook's annotation with this very class


_registry: dict[str, type[Algorithm]] = {}


_A = TypeVar("_A", bound=type[Algorithm])


def register_algorithm(name: str) -> Callable[[_A], _A]:
    """Makes an algorithm known by name, for `AccelStrategy(algorithm=name)` and `Replica`.

    Raises:
        ValueError: if another class has the name.
    """

    def register(cls: _A) -> _A:
        known = _registry.setdefault(name, cls)
        if known is not cls and known.__qualname__ != cls.__qualname__:
            raise ValueError(f"the name {name!r} belongs to {known.__module__}.{known.__qualname__}; choose another")
        _registry[name] = cls
        cls.name = name
        return cls

    return register


def algorithm_names() -> list[str]:
    """Names of the registered algorithms."""
    return list(_registry)


def make_algorithm(algorithm: str | Algorithm, options: dict[str, Any] | None = None) -> Algorithm:
    """An algorithm from its name and options, or as it is.

    Raises:
        ValueError: for an unknown name, or a wrong value of an option.
        TypeError: for an unknown option, or options beside an `Algorithm` object.
    """
    options = options or {}
    if isinstance(algorithm, Algorithm):
        if options:
            raise TypeError(f"give options inside {type(algorithm).__name__}(...), not beside it: got {', '.join(options)}")
        return algorithm
    cls = _registry.get(algorithm) if isinstance(algorithm, str) else None
    if cls is None:
        raise ValueError(f"algorithm must be one of {', '.join(_registry)}: got {algorithm!r}{nearest(algorithm, _registry)}")
    valid = [field.name for field in fields(cls)]  # type: ignore[arg-type]
    for option in options:
        if option not in valid:
            raise TypeError(
                f"algorithm {algorithm!r} takes {', '.join(valid) or 'no options'}: got {option!r}{nearest(option, valid)}"
            )
    return cls(**options)
