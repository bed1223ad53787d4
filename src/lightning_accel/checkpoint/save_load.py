"""A checkpoint of all ranks, saved and loaded by all of them together.

Under `KEY` the checkpoint has the algorithm's common state and the ranks' random generators, which are small. The rest, residuals
and, where they differ by rank, optimizers, is where `rank_files` says. A save writes a new folder of files, then the checkpoint,
and only then removes folders of earlier saves: a rank may be killed at any time, and the checkpoint that is left has its files.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Mapping
from typing import Any

import torch.distributed as dist

from lightning_accel.checkpoint.agreement import all_gather, of_first_rank, raise_together, rank_and_world_size
from lightning_accel.checkpoint.random_generators import get_generators
from lightning_accel.checkpoint.rank_files import RankFiles, choose_place, load_own, remove_rank_files
from lightning_accel.checkpoint.state import KEY, READABLE_VERSIONS, VERSION, Restored, State, fits


def save_checkpoint(
    path: str | os.PathLike[str],
    state: State,
    entries: Mapping[str, Any],
    write: Callable[[str, dict[str, Any]], None],
    *,
    rank_files: RankFiles = "auto",
    returns_early: bool = False,
    group: dist.ProcessGroup | None = None,
) -> None:
    """Writes a checkpoint, and what each rank holds for itself. Collective.

    If it raises, or is killed, the checkpoint that is left is whole and has its files.

    Args:
        path: Path or URL of the checkpoint; rank 0's is everybody's.
        state: State of the replicas.
        entries: Entries of the checkpoint that are saved for each rank, if `state.ranks_differ`.
        write: Function that writes the checkpoint to a path, with its second argument under `KEY`. All ranks call it; rank 0 may
            do the work.
        rank_files: Where the ranks' states go.
        returns_early: Whether `write` returns before the checkpoint is complete; then nothing may be beside it, and files of
            earlier saves stay.
        group: Process group of the ranks; None is the default one.

    Raises:
        RuntimeError: On all ranks, if it failed on any.
    """
    rank, world_size = rank_and_world_size(group)
    name = f"step-{max(state.rounds, default=0)}-{secrets.token_hex(4)}"
    gathered = all_gather((os.fspath(path), name, state.rounds, state.has_own(world_size), get_generators()), group)
    # A path may hold a metric or a number of steps, which differ by rank; with async, rounds may, too.
    agreed_path, folder, rounds, *_ = gathered[0]
    part = state.part(world_size, [generators for *_, generators in gathered])
    if any(has_own for *_, has_own, _ in gathered):
        own = {
            "version": VERSION,
            "rounds": rounds,
            "replicas": state.own,
            "entries": dict(entries) if state.ranks_differ else {},
        }
        place = choose_place(agreed_path, folder, "inside" if returns_early else rank_files, group)
        part |= place.save(own, group)
    raise_together(lambda: write(agreed_path, part), f"write {agreed_path}", group)
    if rank == 0 and not returns_early:
        remove_rank_files(agreed_path, but=part["rank_files"])


def load_checkpoint(
    path: str | os.PathLike[str],
    read: Callable[[str], dict[str, Any]],
    algorithm: str,
    replicas: int,
    *,
    restore_rank_state: bool = True,
    group: dist.ProcessGroup | None = None,
) -> tuple[dict[str, Any], Restored | None]:
    """Reads a checkpoint and what this rank held for itself, and changes nothing. Collective.

    Args:
        path: Path or URL of the checkpoint; rank 0's is everybody's.
        read: Function that reads the checkpoint from a path.
        algorithm: Name of this run's algorithm.
        replicas: Number of this run's replicas.
        restore_rank_state: Whether to read what each rank held for itself.
        group: Process group of the ranks; None is the default one.

    Returns:
        The checkpoint, with this rank's own entries, and the state to apply afterwards; None if there is none in it.

    Raises:
        FileNotFoundError: On all ranks, if a rank's file is missing; the message names it.
        ValueError: On all ranks, if a rank's file is torn or belongs to another save; the message names it.
        RuntimeError: On all ranks, if it failed on any for another reason.
    """
    rank, world_size = rank_and_world_size(group)
    agreed_path = of_first_rank(os.fspath(path), group)

    def read_both() -> tuple[dict[str, Any], Restored | None]:
        checkpoint = read(agreed_path)
        part = checkpoint.get(KEY)
        if part is None:
            return checkpoint, None
        if part.get("version") not in READABLE_VERSIONS:
            raise ValueError(
                f"{agreed_path} must have one of the versions {READABLE_VERSIONS}: got version {part.get('version')}. Update the "
                "package"
            )
        own = None
        if restore_rank_state and part["world_size"] == world_size and fits(part, algorithm, replicas):
            own = load_own(agreed_path, part, rank)
        if own is None:
            return checkpoint, Restored(part, rank, world_size)
        return checkpoint | own["entries"], Restored(part, rank, world_size, own["replicas"])

    return raise_together(read_both, f"read {agreed_path}", group)
