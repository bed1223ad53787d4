"""The replicas' state in a strategy's checkpoints, saved and loaded around the writer and the reader of Lightning's own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import torch
from lightning_utilities.core.apply_func import apply_to_collection

from lightning_accel.checkpoint import save_load
from lightning_accel.checkpoint.rank_files import RankFiles, check_rank_files
from lightning_accel.checkpoint.state import Restored, State, reset
from lightning_accel.data_parallel.replica import Replica
from lightning_accel.strategy.checkpoint_io import returns_early


@dataclass(frozen=True)
class CheckpointOptions:
    """The keywords of a strategy that say how checkpoints are saved and loaded.

    Args:
        rank_files: Where checkpoints keep what each rank holds for itself, such as residuals: "beside" the checkpoint in a file
            of each rank; "inside" the checkpoint, for which rank 0 gathers everything; or "auto": beside it if all ranks see the
            same files there, else inside.
        restore_rank_state: Whether a resumed run restores what each rank held for itself. False goes on with the model and rank
            0's optimizers, when the ranks' files are lost.

    Raises:
        ValueError: For another value of `rank_files`.
    """

    rank_files: RankFiles = "auto"
    restore_rank_state: bool = True

    def __post_init__(self) -> None:
        check_rank_files(self.rank_files)


class Checkpoints:
    """Saves and restores the state of one strategy's replicas.

    Args:
        algorithm: Name of the strategy's algorithm.
        options: How to save and load.

    Attributes:
        final_state: State of the last fit, for those who save after it.
    """

    def __init__(self, algorithm: str, options: CheckpointOptions) -> None:
        self._algorithm = algorithm
        self._options = options
        self._restored: Restored | None = None
        self.final_state: State | None = None

    def state(self, replicas: Sequence[Replica]) -> State:
        """Returns the replicas' state as it is now; tensors are not copied."""
        return State.of(self._algorithm, replicas)

    def keep_final_state(self, replicas: Sequence[Replica]) -> None:
        """Copies the replicas' state to the CPU, where it stays until the next fit."""
        state = self.state(replicas)
        self.final_state = replace(state, own=apply_to_collection(state.own, torch.Tensor, torch.Tensor.cpu))

    def check_writer(self, checkpoint_io: object) -> None:
        """Refuses Lightning's AsyncCheckpointIO if ranks' files have to be beside the checkpoint.

        A checkpoint's files are removed as soon as another is in its place: it must be there when the writer returns.

        Raises:
            ValueError: For AsyncCheckpointIO, or a class derived from it, with `rank_files="beside"`.
        """
        if returns_early(checkpoint_io) and self._options.rank_files == "beside":
            raise ValueError(
                "AsyncCheckpointIO returns before the checkpoint is complete, which rank_files='beside' does not allow: use "
                "rank_files='auto' or 'inside', or leave AsyncCheckpointIO out"
            )

    def save(
        self,
        path: Any,
        state: State,
        entries: dict[str, Any],
        checkpoint_io: object,
        write: Callable[[str, dict[str, Any]], None],
    ) -> None:
        """Writes a checkpoint, and what each rank holds for itself. Collective.

        Args:
            path: Path of the checkpoint; rank 0's is everybody's.
            state: State of the replicas.
            entries: Entries of the checkpoint that follow from weights: each rank's are saved where weights differ.
            checkpoint_io: Lightning's writer.
            write: Function that writes the checkpoint to a path, given our part of it.

        Raises:
            ValueError: For a writer that returns before the checkpoint is complete, if files have to be beside it.
            RuntimeError: On all ranks, if any could not write.
        """
        self.check_writer(checkpoint_io)
        rank_files, is_early = self._options.rank_files, returns_early(checkpoint_io)
        save_load.save_checkpoint(path, state, entries, write, rank_files=rank_files, returns_early=is_early)

    def load(self, path: Any, read: Callable[[str], dict[str, Any]], replicas: int) -> dict[str, Any]:
        """Reads a checkpoint with this rank's own entries, and keeps the replicas' state for `restore`. Collective."""
        restore = self._options.restore_rank_state
        checkpoint, self._restored = save_load.load_checkpoint(path, read, self._algorithm, replicas, restore_rank_state=restore)
        return checkpoint

    def restore(self, replicas: Sequence[Replica]) -> bool:
        """Restores what `load` has kept, once model and optimizers are restored; returns whether it fitted."""
        restored, self._restored = self._restored, None
        if restored is not None:
            return restored.apply(self._algorithm, replicas)
        reset(replicas)
        return False

    def forget(self) -> None:
        """Drops what `load` has kept: a validation restores nothing, and the next fit may be another one."""
        self._restored = None


@contextmanager
def already_read(strategy: Any, checkpoint: dict[str, Any]) -> Iterator[None]:
    """Gives a strategy this checkpoint, whatever path it reads."""
    checkpoint_io = strategy.checkpoint_io
    strategy.checkpoint_io = SimpleNamespace(load_checkpoint=lambda *arguments, **options: checkpoint)
    try:
        yield
    finally:
        strategy.checkpoint_io = checkpoint_io
