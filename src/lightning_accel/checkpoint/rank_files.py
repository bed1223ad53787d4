"""A checkpoint and the ranks' files beside it: the first has what all ranks share, the files what each rank has of its own.

Under `KEY` the checkpoint itself has the algorithm's common state and the ranks' random generators, which are small. Each rank
writes the rest, residuals and, where they differ by rank, optimizers, to a file of its own:

    last.ckpt
    last.ckpt.ranks/step-1200-9f3c2a1b/rank-0-of-2.pt
                                       rank-1-of-2.pt

The checkpoint names the folder that belongs to it. A save writes a new folder, then the checkpoint, and only then removes
folders of earlier saves: a rank may be killed at any time, and the checkpoint that is left has its files.
"""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.serialization import get_unsafe_globals_in_checkpoint

from lightning_accel.checkpoint.agreement import all_gather, raise_together, rank_and_world_size
from lightning_accel.checkpoint.random_generators import get_generators
from lightning_accel.checkpoint.state import KEY, VERSION, Restored, State, fits
from lightning_accel.logs import get_log

_log = get_log(__name__)


def save_checkpoint(
    path: str | os.PathLike[str],
    state: State,
    entries: Mapping[str, Any],
    write: Callable[[dict[str, Any]], None],
    group: dist.ProcessGroup | None = None,
) -> None:
    """Writes the ranks' files, if there is anything to write, and the checkpoint. Collective.

    If it raises, or is killed, the checkpoint that is left is whole and has its files.

    Args:
        path: Path of the checkpoint.
        state: State of the replicas.
        entries: Entries of the checkpoint that go into the rank's file, too, if `state.ranks_differ`.
        write: Function that writes the checkpoint, with its argument under `KEY`. All ranks call it; rank 0 may do the work.
        group: Process group of the ranks; None is the default one.

    Raises:
        RuntimeError: On all ranks, if it failed on any.
        ValueError: On all ranks, if there are files to write and `path` is not a local one.
    """
    rank, world_size = rank_and_world_size(group)
    name = f"step-{max(state.rounds, default=0)}-{secrets.token_hex(4)}"
    gathered = all_gather((name, state.rounds, state.needs_file, get_generators()), group)
    folder = gathered[0][0] if any(needs_file for _, _, needs_file, _ in gathered) else None
    if folder is not None:
        own = {
            "version": VERSION,
            "folder": folder,
            "rank": rank,
            "world_size": world_size,
            "rounds": gathered[0][1],  # the checkpoint's: with async this rank may have finished another number
            "replicas": state.own,
            "entries": dict(entries) if state.ranks_differ else {},
        }
        file = f"{folder}/{_file_name(rank, world_size)}"
        try:
            raise_together(lambda: write_whole(_folders(path) / file, own), f"write its file of {os.fspath(path)}", group)
        except Exception:
            if rank == 0:
                remove_files(path, folder)
            raise
    part = state.part(world_size, [generators for *_, generators in gathered], folder)
    raise_together(lambda: write(part), f"write {os.fspath(path)}", group)
    if rank == 0:
        remove_files(path, but=folder)


def load_checkpoint(
    path: str | os.PathLike[str],
    read: Callable[[], dict[str, Any]],
    algorithm: str,
    replicas: int,
    group: dist.ProcessGroup | None = None,
) -> tuple[dict[str, Any], Restored | None]:
    """Reads a checkpoint and this rank's file, and changes nothing. Collective.

    Args:
        path: Path of the checkpoint.
        read: Function that reads the checkpoint.
        algorithm: Name of this run's algorithm.
        replicas: Number of this run's replicas.
        group: Process group of the ranks; None is the default one.

    Returns:
        The checkpoint, with this rank's own entries, and the state to apply afterwards; None if there is none in it.

    Raises:
        FileNotFoundError: On all ranks, if a rank's file is missing; the message names it.
        ValueError: On all ranks, if a rank's file is torn or belongs to another save; the message names it.
        RuntimeError: On all ranks, if it failed on any for another reason.
    """
    rank, world_size = rank_and_world_size(group)

    def read_both() -> tuple[dict[str, Any], Restored | None]:
        checkpoint = read()
        part = checkpoint.get(KEY)
        if part is None:
            return checkpoint, None
        if part.get("version") != VERSION:
            raise ValueError(
                f"{os.fspath(path)} must have version {VERSION}: got version {part.get('version')}. Update the package"
            )
        if part["rank_files"] is None or part["world_size"] != world_size or not fits(part, algorithm, replicas):
            return checkpoint, Restored(part, rank, world_size)
        own = _read_file(path, part, rank)
        return {**checkpoint, **own["entries"]}, Restored(part, rank, world_size, own["replicas"])

    return raise_together(read_both, f"read {os.fspath(path)}", group)


def remove_files(path: str | os.PathLike[str], folder: str = "step-*", *, but: str | None = None) -> None:
    """Removes the ranks' files of a checkpoint, and logs it if that fails."""
    if _is_remote(path):
        return
    folders = _folders(path)
    try:
        for found in folders.glob(folder):
            if found.name != but:
                shutil.rmtree(found)
        if folders.exists() and not any(folders.iterdir()):
            folders.rmdir()
    except OSError as error:
        _log.warning("the ranks' files of a former checkpoint could not be removed: %s", error)


def write_whole(path: Path, saved: dict[str, Any]) -> None:
    """Writes a file that is complete or absent, and that torch.load reads with weights_only=True.

    Raises:
        TypeError: For a type that such a torch.load refuses.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with beside.open("wb") as file:
            torch.save(saved, file)
            file.flush()
            os.fsync(file.fileno())
        if refused := get_unsafe_globals_in_checkpoint(beside):
            raise TypeError(f"{path} must be made of tensors, numbers, strings, lists and dicts: it holds {', '.join(refused)}")
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def _read_file(path: str | os.PathLike[str], part: dict[str, Any], rank: int) -> dict[str, Any]:
    world_size = part["world_size"]
    # A link, such as Lightning's last.ckpt, has its files where it points to.
    file = _folders(path if _is_remote(path) else os.path.realpath(path)) / part["rank_files"] / _file_name(rank, world_size)
    remedy = "move and copy a checkpoint together with its folder of files; without it, start anew from the model's weights"
    try:
        own: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise FileNotFoundError(f"{file} is missing: {remedy}") from None
    except Exception as error:
        raise ValueError(f"{file} is torn: {type(error).__name__}: {error}; {remedy}") from error
    expected = {
        "version": VERSION,
        "folder": part["rank_files"],
        "rank": rank,
        "world_size": world_size,
        "rounds": [common["rounds"] for common in part["replicas"]],
    }
    got = {name: own.get(name) for name in expected} if isinstance(own, dict) else own
    if got != expected:
        raise ValueError(f"{file} does not belong to {os.fspath(path)}, which needs {expected}: got {got}; {remedy}")
    return own


def _folders(path: str | os.PathLike[str]) -> Path:
    if _is_remote(path):
        raise ValueError(
            f"{os.fspath(path)} is not a local path: each rank writes its own state to a file beside the checkpoint, on a file "
            "system that all ranks share. Give a path of it, without file:// and the like"
        )
    return Path(f"{os.fspath(path)}.ranks")


def _is_remote(path: str | os.PathLike[str]) -> bool:
    return "://" in os.fspath(path)


def _file_name(rank: int, world_size: int) -> str:
    return f"rank-{rank}-of-{world_size}.pt"
