"""The random generators of a process."""

from __future__ import annotations

import contextlib
import random
import sys
from typing import Any

import torch


def get_generators() -> dict[str, Any]:
    """Returns the states of the random generators of this process and its CUDA device."""
    states: dict[str, Any] = {"python": random.getstate(), "torch": torch.get_rng_state()}
    if (numpy := sys.modules.get("numpy")) is not None:
        name, keys, *rest = numpy.random.get_state()
        states["numpy"] = (name, torch.from_numpy(keys.astype("int64")), *rest)
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def set_generators(states: dict[str, Any]) -> None:
    """Restores what `get_generators` returned."""
    random.setstate(states["python"])
    torch.set_rng_state(states["torch"])
    with contextlib.suppress(ImportError):  # a run that has no numpy does not draw from it
        if "numpy" in states:
            import numpy

            name, keys, *rest = states["numpy"]
            numpy.random.set_state((name, keys.numpy().astype("uint32"), *rest))
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
