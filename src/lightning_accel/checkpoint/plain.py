"""Checkpoints of a plain PyTorch loop, complete or absent."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from lightning_accel.checkpoint import save_load
from lightning_accel.checkpoint.files import read_file, write_file
from lightning_accel.checkpoint.rank_files import RankFiles, check_rank_files
from lightning_accel.checkpoint.state import KEY, State
from lightning_accel.data_parallel.wrap import AccelDataParallel, check_wrapped


def save_checkpoint(
    path: str | os.PathLike[str],
    ddp: AccelDataParallel,
    optimizers: torch.optim.Optimizer | Sequence[torch.optim.Optimizer] = (),
    *,
    rank_files: RankFiles = "auto",
    **extra: Any,
) -> None:
    """Writes model, optimizers, the algorithm's state and the random generators'; returns once all is complete. Collective.

    A crash leaves the old file or the new one. State that each rank has of its own, if the algorithm has any, is in the files of
    a folder `<path>.ranks`, or in the file itself.

    Args:
        path: Path of the file, or a URL that fsspec knows; rank 0's is everybody's.
        ddp: Model from `wrap`; all ranks' weights are made equal first.
        optimizers: Optimizers of the model; rank 0's states are written, or each rank's if the algorithm lets weights differ.
        rank_files: "beside" for a folder of each rank's files, which must be where all ranks see the same files; "inside" for
            everything in one file, for which rank 0 gathers the ranks' states; "auto" for the first where it is possible.
        **extra: Anything else that a resumed run needs, such as a gradient scaler's state, as tensors, numbers, strings, lists
            and dicts; rank 0's or each rank's, as for the optimizers.

    Raises:
        RuntimeError: On all ranks, if any of them could not write; an earlier checkpoint is left as it was.
        TypeError: For a model that `wrap` has not returned.
        ValueError: For another value of `rank_files`.
    """
    check_wrapped(ddp)
    check_rank_files(rank_files)
    ddp.replica.consensus()
    state = State.of(ddp.replica.communicator.name, [ddp.replica])
    entries = {"optimizers": [optimizer.state_dict() for optimizer in _listed(optimizers)], "extra": extra}

    def write(path: str, part: dict[str, Any]) -> None:
        _check_extra(extra)
        if dist.get_rank(ddp.process_group) == 0:
            write_file(path, {"model": ddp.module.state_dict(), **entries, KEY: part})

    save_load.save_checkpoint(path, state, entries, write, rank_files=rank_files, group=ddp.process_group)


def load_checkpoint(
    path: str | os.PathLike[str],
    ddp: AccelDataParallel,
    optimizers: torch.optim.Optimizer | Sequence[torch.optim.Optimizer] = (),
    *,
    restore_rank_state: bool = True,
) -> dict[str, Any]:
    """Restores what `save_checkpoint` wrote, and returns its `extra`. Collective; all ranks must see the file.

    Random generators are set, too, if there are as many ranks as there were: call it last before the loop.

    Args:
        path: Path or URL of the file; rank 0's is everybody's.
        ddp: Model from `wrap`.
        optimizers: Optimizers of the model, as many as were saved, in the same order.
        restore_rank_state: Whether to restore what each rank held for itself. False goes on with the model and rank 0's
            optimizers, when the ranks' files are lost.

    Raises:
        FileNotFoundError: On all ranks, if the file or a rank's file is missing.
        ValueError: On all ranks, if a file is torn or no such checkpoint, or holds another number of optimizers.
        TypeError: For a model that `wrap` has not returned.
    """
    check_wrapped(ddp)
    given = _listed(optimizers)
    algorithm = ddp.replica.communicator.name
    read = partial(_read, optimizers=len(given))
    saved, restored = save_load.load_checkpoint(
        path, read, algorithm, 1, restore_rank_state=restore_rank_state, group=ddp.process_group
    )
    assert restored is not None
    ddp.replica.consensus()  # ends what is in flight
    ddp.module.load_state_dict(saved["model"])
    for optimizer, state in zip(given, saved["optimizers"], strict=True):
        optimizer.load_state_dict(state)
    if not restored.apply(algorithm, [ddp.replica]):
        ddp.replica.consensus()  # the algorithm starts anew from these weights
    extra: dict[str, Any] = saved["extra"]
    return extra


def _read(path: str, optimizers: int) -> dict[str, Any]:
    try:
        saved: dict[str, Any] = read_file(path)
    except FileNotFoundError:
        raise
    except Exception as error:
        raise ValueError(f"{path} is torn or no checkpoint: {type(error).__name__}: {error}") from error
    if not isinstance(saved, dict) or not {KEY, "model", "optimizers", "extra"} <= saved.keys():
        raise ValueError(f"{path} was not written by save_checkpoint")
    if len(saved["optimizers"]) != optimizers:
        raise ValueError(f"{path} holds {len(saved['optimizers'])} optimizers, {optimizers} were given")
    return saved


def _listed(optimizers: torch.optim.Optimizer | Sequence[torch.optim.Optimizer]) -> list[torch.optim.Optimizer]:
    return [optimizers] if isinstance(optimizers, torch.optim.Optimizer) else list(optimizers)


def _check_extra(value: object, place: str = "extra") -> None:
    """Refuses types that torch writes but does not read with weights_only; else only a run that resumes would find out."""
    if isinstance(value, dict):
        for key, item in value.items():
            _check_extra(key, f"a key of {place}")
            _check_extra(item, f"{place}[{key!r}]")
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            _check_extra(item, f"{place}[{index}]")
    elif value is not None and type(value) not in (bool, int, float, str) and not isinstance(value, torch.Tensor):
        raise TypeError(f"{place} must be made of tensors, numbers, strings, lists and dicts: it is a {type(value).__name__}")
