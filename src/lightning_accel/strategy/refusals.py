"""Devices and settings that the strategies of Trainer and Fabric refuse, before any process is started."""

from __future__ import annotations

import sys
from typing import Any

import torch

from lightning_accel.strategy.advice import respell


def check_device(device: torch.device, frontend: str) -> None:
    """Refuses Apple's MPS.

    Raises:
        ValueError: For a device of type "mps".
    """
    if device.type == "mps":
        raise ValueError(
            "AccelStrategy trains on CPU and CUDA; Apple's MPS has no collective communication. "
            f"Use {frontend}(accelerator='cpu'), or {frontend}(strategy='auto') for one MPS device."
        )


def check_interactive(strategy: Any, frontend: str) -> None:
    """Refuses to start processes in a notebook or at a prompt, except by fork; Lightning would advise a strategy of its own.

    Args:
        strategy: Strategy that has its launcher.
        frontend: "Trainer" or "Fabric".

    Raises:
        ValueError: For any other way to start processes.
    """
    is_interactive = hasattr(sys, "ps1") or bool(sys.flags.interactive)
    if is_interactive and strategy.launcher is not None and not strategy.launcher.is_interactive_compatible:
        raise ValueError(
            "in a notebook or at Python's prompt, processes can only be started by fork: write "
            f"{frontend}(strategy={respell(strategy, {}, '_notebook')}), or run a script"
        )


def check_gradients_stay(algorithm: str, gradient_clip_val: float | None, precision: Any) -> None:
    """Refuses settings that change gradients before the step, for an algorithm that leaves momentum in `.grad`.

    Args:
        algorithm: Name of the algorithm.
        gradient_clip_val: Bound of gradient clipping; None or 0 for no clipping.
        precision: Precision plugin of the root.

    Raises:
        ValueError: For gradient clipping, and for a precision that scales the loss.
    """
    if gradient_clip_val:
        raise ValueError(
            f"algorithm {algorithm!r} leaves momentum in .grad, which must not be clipped: got a bound of "
            f"{gradient_clip_val}. Leave it out, or use algorithm 'bytegrad'"
        )
    if getattr(precision, "scaler", None) is not None:
        raise ValueError(
            f"algorithm {algorithm!r} leaves momentum in .grad, which no loss scale must be taken out of: "
            "use precision='bf16-mixed' or '32-true' in place of 16-bit floats with a scaler"
        )
