"""What the strategies of Trainer and Fabric refuse, before any process is started."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch.nn.parallel import DistributedDataParallel

from lightning_accel.checkpoint.state import State

_REFUSED = {
    "ddp_comm_state": "the algorithm is the communication hook",
    "ddp_comm_hook": "the algorithm is the communication hook; write your own with lightning_accel.register_algorithm",
    "ddp_comm_wrapper": "the algorithm is the communication hook; choose its codec instead",
    "model_averaging_period": "averaging belongs to the algorithm",
}
"""Arguments of DDPStrategy that would take the algorithm's place, and why each is refused."""


def check_arguments(strategy: type, arguments: dict[str, Any], options: list[str]) -> None:
    """Refuses what neither the strategy nor DistributedDataParallel takes.

    Args:
        strategy: whose constructor names its own arguments.
        arguments: the others that were given; those that are refused but None are taken out.
        options: of algorithms, among the constructor's arguments.

    Raises:
        ValueError: for what would take the algorithm's place.
        TypeError: for what nobody takes, with the valid ones.
    """
    for name, reason in _REFUSED.items():
        if arguments.pop(name, None) is not None:
            raise ValueError(f"AccelStrategy does not take {name}: {reason}")
    own = inspect.signature(strategy.__init__).parameters  # type: ignore[misc]
    others = [name for name in own if name not in ("self", "kwargs", *options)]
    of_ddp = inspect.signature(DistributedDataParallel.__init__).parameters
    valid = [name for name in of_ddp if name not in ("self", "module", "device_ids")]
    for name in arguments:
        if name not in valid:
            close = difflib.get_close_matches(name, [*options, *others, *valid], n=1)
            raise TypeError(
                f"AccelStrategy takes {', '.join(others)}, the options {', '.join(options)}, and DistributedDataParallel's "
                f"{', '.join(valid)}: got {name!r}" + (f"; did you mean {close[0]!r}?" if close else "")
            )


def check_device(device: torch.device, frontend: str) -> None:
    """Raises ValueError for Apple's MPS."""
    if device.type == "mps":
        raise ValueError(
            "AccelStrategy trains on CPU and CUDA; Apple's MPS has no collective communication. "
            f"Use {frontend}(accelerator='cpu'), or {frontend}(strategy='auto') for one MPS device."
        )


def check_gradients_stay(algorithm: str, gradient_clip_val: float | None, precision: Any) -> None:
    """Refuses what changes gradients before the step, for an algorithm that leaves something else in `.grad`.

    Raises:
        ValueError: for gradient clipping, and for a precision that scales the loss.
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


def check_checkpoint_io(checkpoint_io: object, state: Callable[[], State]) -> None:
    """Raises ValueError for Lightning's AsyncCheckpointIO where ranks write files beside the checkpoint.

    A checkpoint's files are removed as soon as another is in its place: it must be there when the writer returns.
    """
    is_async = any(cls.__name__ == "AsyncCheckpointIO" for cls in type(checkpoint_io).__mro__)
    if is_async and state().needs_file:
        raise ValueError(
            f"with {state().algorithm!r} each rank writes a file beside the checkpoint, and the checkpoint must be complete when "
            "its writer returns: leave AsyncCheckpointIO out"
        )
