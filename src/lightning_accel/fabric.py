"""`AccelStrategy` of Fabric, for the Lightning root in use: `lightning`, unless `lightning_fabric` alone has been imported."""

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_accel.strategy.fabric_unified import AccelStrategy

__all__ = ["AccelStrategy"]


def __getattr__(name: str) -> Any:
    if name == "AccelStrategy":
        is_standalone = "lightning_fabric" in sys.modules and "lightning.fabric" not in sys.modules
        root = "fabric_standalone" if is_standalone else "fabric_unified"
        return import_module(f"lightning_accel.strategy.{root}").AccelStrategy
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
