"""The replicas' state in a strategy's checkpoints, saved and loaded around the writer and the reader of Lightning's own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch
from lightning_utilities.core.apply_func import apply_to_collection

from lightning_accel.checkpoint import rank_files
from lightning_accel.checkpoint.state import Restored, State
from lightning_accel.data_parallel.replica import Replica


class Checkpoints:
    """Saves and restores the state of one strategy's replicas.

    Args:
        algorithm: Name of the strategy's algorithm.

    Attributes:
        final_state: State of the last fit, for those who save after it.
    """

    def __init__(self, algorithm: str) -> None:
        self._algorithm = algorithm
        self._restored: Restored | None = None
        self.final_state: State | None = None

    def state(self, replicas: Sequence[Replica]) -> State:
        """Returns the replicas' state as it is now; tensors are not copied."""
        return State.of(self._algorithm, replicas)

    def keep_final_state(self, replicas: Sequence[Replica]) -> None:
        """Copies the replicas' state to the CPU, where it stays until the next fit."""
        state = self.state(replicas)
        self.final_state = replace(state, own=apply_to_collection(state.own, torch.Tensor, torch.Tensor.cpu))

    def save(
        self, path: Any, state: State, entries: dict[str, Any], checkpoint_io: object, write: Callable[[dict[str, Any]], None]
    ) -> None:
        """Writes a checkpoint, and beside it what each rank holds for itself. Collective.

        Args:
            path: Path of the checkpoint.
            state: State of the replicas.
            entries: Entries of the checkpoint that follow from weights: each rank's are saved where weights differ.
            checkpoint_io: Lightning's writer.
            write: Function that writes the checkpoint, given our part of it.

        Raises:
            ValueError: For a writer that returns before the checkpoint is complete, or files at a path that is not local.
            RuntimeError: On all ranks, if any could not write.
        """
        check_checkpoint_io(checkpoint_io, lambda: state)
        rank_files.save_checkpoint(path, state, entries, write)

    def load(self, path: Any, read: Callable[[], dict[str, Any]], replicas: int) -> dict[str, Any]:
        """Reads a checkpoint with this rank's own entries, and keeps the replicas' state for `restore`. Collective."""
        checkpoint, self._restored = rank_files.load_checkpoint(path, read, self._algorithm, replicas)
        return checkpoint

    def restore(self, replicas: Sequence[Replica]) -> bool:
        """Restores what `load` has kept, once model and optimizers are restored; returns whether it fitted."""
        restored, self._restored = self._restored, None
        return restored is not None and restored.apply(self._algorithm, replicas)

    def forget(self) -> None:
        """Drops what `load` has kept: a validation restores nothing, and the next fit may be another one."""
        self._restored = None


def check_checkpoint_io(checkpoint_io: object, state: Callable[[], State]) -> None:
    """Refuses Lightning's AsyncCheckpointIO where ranks write files beside the checkpoint.

    A checkpoint's files are removed as soon as another is in its place: it must be there when the writer returns.

    Raises:
        ValueError: For AsyncCheckpointIO, or a class derived from it.
    """
    is_async = any(cls.__name__ == "AsyncCheckpointIO" for cls in type(checkpoint_io).__mro__)
    if is_async and state().needs_file:
        raise ValueError(
            f"with {state().algorithm!r} each rank writes a file beside the checkpoint, and the checkpoint must be complete when "
            "its writer returns: leave AsyncCheckpointIO out"
        )


@contextmanager
def already_read(strategy: Any, checkpoint: dict[str, Any]) -> Iterator[None]:
    """Gives a strategy this checkpoint, whatever path it reads."""
    checkpoint_io = strategy.checkpoint_io
    strategy.checkpoint_io = SimpleNamespace(load_checkpoint=lambda *arguments, **options: checkpoint)
    try:
        yield
    finally:
        strategy.checkpoint_io = checkpoint_io
