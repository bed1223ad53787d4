"""What a checkpoint holds of the ranks: what they have in common in it, what each has of its own in files beside it.

Under `KEY` the checkpoint itself has the algorithm's common state, and the ranks' random generators, which are small. What is
not, residuals, and optimizers where they differ by rank, is written by each rank to a file of its own:

    last.ckpt
    last.ckpt.ranks/step-1200-9f3c2a1b/rank-0-of-2.pt
                                       rank-1-of-2.pt

The checkpoint names the folder that belongs to it. A save writes a new folder, then the checkpoint, and only then removes
folders of earlier saves: whoever is killed in between, the checkpoint that is there has its files.
"""

from __future__ import annotations

import contextlib
import logging
import os
import random
import secrets
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.serialization import get_unsafe_globals_in_checkpoint

from lightning_accel.replica import Replica

_log = logging.getLogger(__name__)

KEY = "lightning_accel"
"""Of our part in a checkpoint; who does not know it leaves it alone."""

_VERSION = 1

_T = TypeVar("_T")
_Group = dist.ProcessGroup | None


@dataclass(frozen=True)
class State:
    """The state of replicas that train with one algorithm, on this rank.

    Attributes:
        algorithm: its name.
        common: of each replica, what all ranks hold alike.
        own: of each replica, what this rank holds for itself.
        ranks_differ: whether optimizers, too, are each rank's own.
    """

    algorithm: str
    common: list[dict[str, Any]]
    own: list[dict[str, Any]]
    ranks_differ: bool

    @classmethod
    def of(cls, algorithm: str, replicas: Sequence[Replica]) -> State:
        """The state as it is now; tensors are not copied."""
        return cls(
            algorithm,
            [replica.state_dict() for replica in replicas],
            [replica.algorithm.rank_state_dict() for replica in replicas],
            any(replica.algorithm.ranks_differ for replica in replicas),
        )

    @property
    def needs_file(self) -> bool:
        """Whether this rank holds anything for itself, but for its random generators."""
        return self.ranks_differ or any(self.own)

    @property
    def rounds(self) -> list[int]:
        """Finished by each replica."""
        return [common["rounds"] for common in self.common]

    def part(self, world_size: int, generators: list[dict[str, Any]] | None = None, folder: str | None = None) -> dict[str, Any]:
        """What goes into the checkpoint; with neither generators nor folder as one rank can write it alone."""
        return {
            "version": _VERSION,
            "algorithm": self.algorithm,
            "world_size": world_size,
            "replicas": self.common,
            "generators": generators,
            "rank_files": folder,
        }


@dataclass(frozen=True)
class Restored:
    """What a checkpoint held for this rank: read and checked, not yet taken up.

    Attributes:
        part: of the checkpoint, under `KEY`.
        rank: that reads.
        world_size: of the run that reads.
        own: of each replica, what this rank held for itself; None where there is no file, or none that fits.
    """

    part: dict[str, Any]
    rank: int
    world_size: int
    own: list[dict[str, Any]] | None = None

    def apply(self, algorithm: str, replicas: Sequence[Replica]) -> bool:
        """Takes it up, once model and optimizers have been restored; whether the algorithm's state was fitting."""
        part = self.part
        is_fitting = _fits(part, algorithm, len(replicas))
        if is_fitting:
            for replica, common in zip(replicas, part["replicas"], strict=True):
                replica.load_state_dict(common)
            if self.own is not None:
                for replica, own in zip(replicas, self.own, strict=True):
                    replica.algorithm.load_rank_state_dict(own)
            self._warn_of_loss()
        else:
            modules = "" if len(replicas) == len(part["replicas"]) else f" on {len(part['replicas'])} modules"
            _log.warning(
                "the checkpoint is of algorithm %r%s, this run uses %r%s: its state starts anew",
                part["algorithm"],
                modules,
                algorithm,
                modules and f" on {len(replicas)}",
            )
        if part["generators"] is not None and part["world_size"] == self.world_size:
            _set_generators(part["generators"][self.rank])
        return is_fitting

    def _warn_of_loss(self) -> None:
        if self.rank != 0:
            return
        if self.part["generators"] is None:
            _log.warning(
                "the checkpoint was written by rank 0 alone, when a run failed: what each rank held for itself (residuals, "
                "optimizers, random generators) starts anew"
            )
        elif self.part["rank_files"] is not None and self.own is None:
            _log.warning(
                "the checkpoint is of %d ranks, this run has %d: model and optimizers are those of rank 0, what each rank held "
                "for itself (residuals, random generators) starts anew",
                self.part["world_size"],
                self.world_size,
            )


def save_checkpoint(
    path: str | os.PathLike[str],
    state: State,
    entries: Mapping[str, Any],
    write: Callable[[dict[str, Any]], None],
    group: _Group = None,
) -> None:
    """Writes the ranks' files, if there is anything to write, and the checkpoint. Collective.

    Whenever it raises, or is killed, the checkpoint that is there is whole, and has its files.

    Args:
        path: of the checkpoint.
        state: of the replicas.
        entries: of the checkpoint that belong into the rank's file, too, if `state.ranks_differ`.
        write: writes the checkpoint with what it gets under `KEY`; called on all ranks, it may leave the work to rank 0.
        group: of the ranks; None is the default one.

    Raises:
        RuntimeError: on all ranks, if it failed on any.
        ValueError: on all ranks, if there are files to write and `path` is not a local one.
    """
    rank, world_size = _place(group)
    name = f"step-{max(state.rounds, default=0)}-{secrets.token_hex(4)}"
    said = _all_gather((name, state.rounds, state.needs_file, _generators()), group)
    folder = said[0][0] if any(needs_file for _, _, needs_file, _ in said) else None
    if folder is not None:
        own = {
            "version": _VERSION,
            "folder": folder,
            "rank": rank,
            "world_size": world_size,
            "rounds": said[0][1],  # the checkpoint's: with async this rank may have finished another number
            "replicas": state.own,
            "entries": dict(entries) if state.ranks_differ else {},
        }
        file = f"{folder}/{_file_name(rank, world_size)}"
        try:
            together(lambda: write_whole(_folders(path) / file, own), f"write its file of {os.fspath(path)}", group)
        except Exception:
            if rank == 0:
                remove_files(path, folder)
            raise
    part = state.part(world_size, [generators for *_, generators in said], folder)
    together(lambda: write(part), f"write {os.fspath(path)}", group)
    if rank == 0:
        remove_files(path, but=folder)


def load_checkpoint(
    path: str | os.PathLike[str],
    read: Callable[[], dict[str, Any]],
    algorithm: str,
    replicas: int,
    group: _Group = None,
) -> tuple[dict[str, Any], Restored | None]:
    """Reads a checkpoint and this rank's file, and changes nothing. Collective.

    Args:
        path: of the checkpoint.
        read: reads it.
        algorithm: of this run.
        replicas: of this run: how many there are.
        group: of the ranks; None is the default one.

    Returns:
        The checkpoint, with the entries that are each rank's own, and what is to be applied afterwards; None if the
        checkpoint is not one of ours.

    Raises:
        FileNotFoundError: on all ranks, if a rank's file is missing; it names the file.
        ValueError: on all ranks, if a rank's file is torn, or belongs to another save; it names the file.
        RuntimeError: on all ranks, if it failed otherwise on any.
    """
    rank, world_size = _place(group)

    def read_both() -> tuple[dict[str, Any], Restored | None]:
        checkpoint = read()
        part = checkpoint.get(KEY)
        if part is None:
            return checkpoint, None
        if part.get("version") != _VERSION:
            raise ValueError(
                f"{os.fspath(path)} is of version {part.get('version')}, this is version {_VERSION}: update the package"
            )
        if part["rank_files"] is None or part["world_size"] != world_size or not _fits(part, algorithm, replicas):
            return checkpoint, Restored(part, rank, world_size)
        own = _read_file(path, part, rank)
        return {**checkpoint, **own["entries"]}, Restored(part, rank, world_size, own["replicas"])

    return together(read_both, f"read {os.fspath(path)}", group)


def remove_files(path: str | os.PathLike[str], folder: str = "step-*", *, but: str | None = None) -> None:
    """Removes the ranks' files of a checkpoint; one that cannot be removed is logged."""
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
        _log.warning("files of ranks that belong to no checkpoint any more could not be removed: %s", error)


def together(action: Callable[[], _T], what: str, group: _Group = None) -> _T:
    """Does it on this rank; where it failed on any, all ranks raise alike, so that none goes on alone. Collective.

    Raises:
        FileNotFoundError: if the first rank that failed raised it, and so ValueError.
        RuntimeError: if it raised anything else.
    """
    error: Exception | None = None
    try:
        done = action()
    except Exception as raised:
        error = raised
    name = type(error).__name__
    own = None if error is None else (name, f"rank {_place(group)[0]} could not {what}: {name}: {error}")
    for failure in _all_gather(own, group):
        if failure is not None:
            name, message = failure
            raise {"FileNotFoundError": FileNotFoundError, "ValueError": ValueError}.get(name, RuntimeError)(message) from error
    return done


def write_whole(path: Path, saved: dict[str, Any]) -> None:
    """Writes a file that is complete or not there, and that torch.load reads with weights_only=True.

    Raises:
        TypeError: for a type that torch.load refuses then.
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


def _fits(part: dict[str, Any], algorithm: str, replicas: int) -> bool:
    return (part["algorithm"], len(part["replicas"])) == (algorithm, replicas)


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
        "version": _VERSION,
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
            f"{os.fspath(path)} is not a local path: what each rank holds for itself is in files beside the checkpoint, on a "
            "file system that all ranks share. Give a path of it, without file:// and the like"
        )
    return Path(f"{os.fspath(path)}.ranks")


def _is_remote(path: str | os.PathLike[str]) -> bool:
    return "://" in os.fspath(path)


def _file_name(rank: int, world_size: int) -> str:
    return f"rank-{rank}-of-{world_size}.pt"


def _place(group: _Group) -> tuple[int, int]:
    """Rank and world size; alone where there is no process group."""
    is_alone = not dist.is_initialized()
    return (0, 1) if is_alone else (dist.get_rank(group), dist.get_world_size(group))


def _all_gather(value: Any, group: _Group) -> list[Any]:
    values = [value] * _place(group)[1]
    if len(values) > 1:
        dist.all_gather_object(values, value, group=group)
    return values


def _generators() -> dict[str, Any]:
    """States of the random generators of this process and its CUDA device."""
    states: dict[str, Any] = {"python": random.getstate(), "torch": torch.get_rng_state()}
    if (numpy := sys.modules.get("numpy")) is not None:
        name, keys, *rest = numpy.random.get_state()
        states["numpy"] = (name, torch.from_numpy(keys.astype("int64")), *rest)
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def _set_generators(states: dict[str, Any]) -> None:
    random.setstate(states["python"])
    torch.set_rng_state(states["torch"])
    with contextlib.suppress(ImportError):  # a run that has no numpy does not draw from it
        if "numpy" in states:
            import numpy

            name, keys, *rest = states["numpy"]
            numpy.random.set_state((name, keys.numpy().astype("uint32"), *rest))
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
