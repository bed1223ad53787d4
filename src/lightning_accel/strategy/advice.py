"""What to write for `strategy=` in place of what the user wrote: advice that keeps the algorithm and its options."""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

from lightning_accel.algorithms import Algorithm
from lightning_accel_autoload import FLAGS, START_METHODS

_NAME = re.compile(f"(.*?)({'|'.join(START_METHODS)})({'|'.join(FLAGS)})")


def respell(strategy: Any, arguments: Mapping[str, object], start: str | None = None) -> str:
    """Returns the value of `strategy=` with something added, in the user's own way: a name, or the class with its keywords.

    Args:
        strategy: Strategy of the Trainer or Fabric.
        arguments: Arguments to add. Those that no name stands for need the class.
        start: Part of a name that says how processes start, such as "_notebook"; None keeps the strategy's.
    """
    flag = next((flag for flag, meaning in FLAGS.items() if meaning == arguments), None)
    if strategy.registered_name is not None and flag is not None:
        parts = _NAME.fullmatch(strategy.registered_name)
        assert parts is not None
        return repr(parts[1] + (parts[2] if start is None else start) + (flag or parts[3]))
    method = {} if start is None else {"start_method": START_METHODS[start]}
    defaults = {name: parameter.default for name, parameter in inspect.signature(type(strategy)).parameters.items()}
    given = {name: value for name, value in strategy.keywords.items() if value is not None and value != defaults.get(name)}
    written = {"algorithm": strategy.algorithm.name, **given, **arguments, **method}
    return f"AccelStrategy({', '.join(f'{name}={_show(value)}' for name, value in written.items())})"


def _show(value: object) -> str:
    return repr(value) if isinstance(value, str | int | float | timedelta | Algorithm) else "..."
