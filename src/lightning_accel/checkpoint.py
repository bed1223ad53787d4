"""Checkpoints of a plain PyTorch loop: complete or not there."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from lightning_accel.data_parallel import AccelDataParallel

_log = logging.getLogger(__name__)

_VERSION = 1


def save_checkpoint(
    path: str | os.PathLike[str],
    ddp: AccelDataParallel,
    optimizers: torch.optim.Optimizer | Sequence[torch.optim.Optimizer] = (),
    **extra: Any,
) -> None:
    """Writes model, optimizers and the algorithm's state to one file; returns on all ranks once it is complete. Collective.

    The file is written beside its place and then moved there, so that a crash leaves the old one or the new one.

    Args:
        path: of the file.
        ddp: from `wrap`; all ranks' weights are made equal first.
        optimizers: rank 0's states are written.
        **extra: whatever else a resumed run needs, as tensors, numbers, strings, lists and dicts.
    """
    ddp.replica.consensus()
    error: Exception | None = None
    if dist.get_rank(ddp.process_group) == 0:
        try:
            _check_extra(extra)
            _write(Path(path), _collect(ddp, optimizers, extra))
        except Exception as raised:
            error = raised
    failures: list[Any] = [None if error is None else f"{type(error).__name__}: {error}"]
    # Every rank learns of a full disk, so that none goes on to wait for the others.
    dist.broadcast_object_list(failures, group=ddp.process_group, group_src=0)
    if failures[0] is not None:
        raise RuntimeError(f"rank 0 could not write {os.fspath(path)}: {failures[0]}") from error


def load_checkpoint(
    path: str | os.PathLike[str],
    ddp: AccelDataParallel,
    optimizers: torch.optim.Optimizer | Sequence[torch.optim.Optimizer] = (),
) -> dict[str, Any]:
    """Takes up what `save_checkpoint` wrote, and returns its `extra`. All ranks call it, and all must see the file.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is no such checkpoint, or holds another number of optimizers.
    """
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise
    except Exception as error:
        raise ValueError(f"{os.fspath(path)} is torn or no checkpoint: {type(error).__name__}: {error}") from error
    if not isinstance(saved, dict) or saved.get("version") != _VERSION:
        raise ValueError(f"{os.fspath(path)} was not written by save_checkpoint")
    given = _listed(optimizers)
    if len(given) != len(saved["optimizers"]):
        raise ValueError(f"{os.fspath(path)} holds {len(saved['optimizers'])} optimizers, {len(given)} were given")
    ddp.module.load_state_dict(saved["model"])
    for optimizer, state in zip(given, saved["optimizers"], strict=True):
        optimizer.load_state_dict(state)
    name = ddp.replica.communicator.name
    if saved["algorithm"] == name:
        ddp.replica.load_state_dict(saved["replica"])
    else:
        _log.warning("the checkpoint is of algorithm %r, this run uses %r: its state starts anew", saved["algorithm"], name)
    extra: dict[str, Any] = saved["extra"]
    return extra


def _collect(
    ddp: AccelDataParallel, optimizers: torch.optim.Optimizer | Sequence[torch.optim.Optimizer], extra: dict[str, Any]
) -> dict[str, Any]:
    return {
        "version": _VERSION,
        "algorithm": ddp.replica.communicator.name,
        "model": ddp.module.state_dict(),
        "optimizers": [optimizer.state_dict() for optimizer in _listed(optimizers)],
        "replica": ddp.replica.state_dict(),
        "extra": extra,
    }


def _listed(optimizers: torch.optim.Optimizer | Sequence[torch.optim.Optimizer]) -> list[torch.optim.Optimizer]:
    return [optimizers] if isinstance(optimizers, torch.optim.Optimizer) else list(optimizers)


def _check_extra(value: object, place: str = "extra") -> None:
    """Refuses what could be written but not be read with weights_only: a run that resumes would be the first to find out."""
    if isinstance(value, dict):
        for key, item in value.items():
            _check_extra(key, f"a key of {place}")
            _check_extra(item, f"{place}[{key!r}]")
    elif isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            _check_extra(item, f"{place}[{index}]")
    elif value is not None and type(value) not in (bool, int, float, str) and not isinstance(value, torch.Tensor):
        raise TypeError(f"{place} must be made of tensors, numbers, strings, lists and dicts: it is a {type(value).__name__}")


def _write(path: Path, saved: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with beside.open("wb") as file:
            torch.save(saved, file)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)
