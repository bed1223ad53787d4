"""`AccelStrategy` for Fabric, of the Lightning root in use: `lightning`, unless `lightning_fabric` alone has been imported."""

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lightning_accel.strategy.lightning_fabric_root import AccelStrategy

__all__ = ["AccelStrategy"]


def __getattr__(name: str) -> Any:
    if name == "AccelStrategy":
        only_separate = "lightning_fabric" in sys.modules and "lightning.fabric" not in sys.modules
        root = "fabric_root" if only_separate else "lightning_fabric_root"
        return import_module(f"lightning_accel.strategy.{root}").AccelStrategy
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
