"""Algorithms by name, and the options that they take together: the fields of their dataclasses."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import MISSING, Field, dataclass, fields
from functools import reduce
from operator import or_
from typing import Any, TypeVar, get_type_hints

from torch.nn.parallel import DistributedDataParallel

from lightning_accel.algorithms.base import Algorithm
from lightning_accel.algorithms.common.docstrings import parse_args
from lightning_accel.algorithms.common.option_checks import hint, nearest

_registry: dict[str, type[Algorithm]] = {}

_reserved = {
    name: "DistributedDataParallel" for name in inspect.signature(DistributedDataParallel.__init__).parameters if name != "self"
}
"""Keywords that are given beside options, and what takes them; see `reserve_keywords`."""

_A = TypeVar("_A", bound=type[Algorithm])


@dataclass(frozen=True)
class Option:
    """A keyword of one or several algorithms.

    Attributes:
        annotation: Union of the types that the algorithms give it.
        doc: Entries of the algorithms' docstrings, each after the algorithms that it is true of, with their defaults.
    """

    annotation: Any
    doc: str


def register_algorithm(name: str) -> Callable[[_A], _A]:
    """Makes an algorithm known by name, for `AccelStrategy(algorithm=name)`, `wrap` and `Replica`.

    Both strategies, LightningCLI and `wrap` take the fields of its dataclass as keywords, and show what its docstring says of
    each under "Args:".

    Raises:
        ValueError: If another class has the name, or an option has that of a keyword which is given beside it.
    """

    def register(cls: _A) -> _A:
        known = _registry.get(name, cls)
        if known is not cls and known.__qualname__ != cls.__qualname__:
            raise ValueError(f"the name {name!r} belongs to {known.__module__}.{known.__qualname__}; choose another")
        _check_free(name, cls, _reserved)
        _registry[name] = cls
        cls.name = name
        return cls

    return register


def reserve_keywords(taker: str, names: Iterable[str]) -> None:
    """Keeps keywords for `taker`, which takes options of algorithms beside its own: no algorithm may have such an option.

    Raises:
        ValueError: If a registered algorithm has one.
    """
    reserved = dict.fromkeys(names, taker)
    for name, cls in _registry.items():
        _check_free(name, cls, reserved)
    _reserved.update(reserved)


def algorithm_names() -> list[str]:
    """Returns the names of the registered algorithms."""
    return list(_registry)


def algorithm_options() -> dict[str, Option]:
    """Returns all registered algorithms' options by name."""
    annotations: dict[str, list[Any]] = {}
    takers: dict[str, dict[str, dict[str, list[str]]]] = {}
    """{option: {doc: {default: algorithms}}}"""
    for algorithm, cls in _registry.items():
        hints, docs = type_hints(cls), _option_docs(cls)
        for field in _option_fields(cls):
            annotations.setdefault(field.name, []).append(hints.get(field.name, Any))
            default = "computed" if field.default is MISSING else repr(field.default)
            by_default = takers.setdefault(field.name, {}).setdefault(docs.get(field.name, ""), {})
            by_default.setdefault(default, []).append(algorithm)
    return {
        name: Option(
            reduce(or_, [*annotations[name], None]),
            " ".join(f"For {_list_takers(by_default)}: {doc}" for doc, by_default in entries.items()),
        )
        for name, entries in takers.items()
    }


def make_algorithm(algorithm: str | Algorithm, options: Mapping[str, Any] | None = None) -> Algorithm:
    """Makes an algorithm from its name and options, or returns it as it is.

    Raises:
        ValueError: For an unknown name, or a wrong value of an option.
        TypeError: For an unknown option, or options beside an `Algorithm` object.
    """
    options = options or {}
    if isinstance(algorithm, Algorithm):
        if options:
            raise TypeError(f"give options inside {type(algorithm).__name__}(...), not beside it: got {', '.join(options)}")
        return algorithm
    cls = _registry.get(algorithm) if isinstance(algorithm, str) else None
    if cls is None:
        raise ValueError(f"algorithm must be one of {', '.join(_registry)}: got {algorithm!r}{hint(algorithm, _registry)}")
    valid = [field.name for field in _option_fields(cls)]
    for option in options:
        if option not in valid:
            takers = [name for name, other in _registry.items() if option in (field.name for field in _option_fields(other))]
            belongs = f", an option of {', '.join(takers)}" if takers else nearest(option, valid)
            raise TypeError(f"algorithm {algorithm!r} takes {', '.join(valid) or 'no options'}: got {option!r}{belongs}")
    return cls(**options)


def check_keywords(taker: str, algorithm: str | Algorithm, given: Iterable[str], arguments: Mapping[str, Iterable[str]]) -> None:
    """Refuses a keyword that nobody takes.

    Args:
        taker: Name of what was called.
        algorithm: Algorithm that was given, or its name.
        given: Keywords that were given.
        arguments: Keywords that are taken beside algorithms' options, by what takes them.

    Raises:
        TypeError: For the first unknown keyword, with the nearest one and the algorithm's options.
    """
    names = [*algorithm_options(), *(name for group in arguments.values() for name in group)]
    for name in given:
        if name not in names:
            known = algorithm if isinstance(algorithm, Algorithm) else _registry.get(str(algorithm))
            options = [field.name for field in _option_fields(known)] if known is not None else []
            told = f" Options of {known.name}: {', '.join(options) or 'none'}." if known is not None else ""
            end = hint(name, names) or "."
            raise TypeError(f"{taker} does not take {name!r}{end}{told} It also takes those of {', '.join(arguments)}")


def _check_free(name: str, cls: type[Algorithm], reserved: Mapping[str, str]) -> None:
    for option in _option_fields(cls):
        if option.name in reserved:
            raise ValueError(
                f"option {option.name!r} of algorithm {name!r} ({cls.__module__}.{cls.__qualname__}) needs a name of its "
                f"own: {reserved[option.name]} takes an argument {option.name!r} beside it. Rename the option"
            )


def type_hints(annotated: Any) -> dict[str, Any]:
    """Returns the types of a class's fields or a function's parameters; nothing if a name is known to type checkers alone."""
    try:
        return get_type_hints(annotated)
    except NameError:
        return {}


def _list_takers(by_default: Mapping[str, Sequence[str]]) -> str:
    return "; ".join(f"{', '.join(names)} (default {default})" for default, names in by_default.items())


def _option_fields(cls: type[Algorithm] | Algorithm) -> list[Field[Any]]:
    return [field for field in fields(cls) if field.init]  # type: ignore[arg-type]


def _option_docs(cls: type) -> dict[str, str]:
    docs: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        docs |= parse_args(base.__doc__)
    return docs
