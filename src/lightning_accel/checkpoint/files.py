"""Files of tensors and plain data, at local paths and at fsspec's URLs: each is written whole or not at all."""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import torch
from fsspec.core import url_to_fs  # type: ignore[import-untyped]
from fsspec.implementations.local import LocalFileSystem  # type: ignore[import-untyped]
from torch.serialization import get_unsafe_globals_in_checkpoint


def write_file(path: str, saved: Any, *, plain_data: bool = True) -> None:
    """Writes with torch.save, and returns once the disk has the file; a crash leaves the old file or the new one.

    Args:
        path: Local path or URL; missing folders are made.
        saved: What to write.
        plain_data: Whether to refuse what torch.load refuses with weights_only=True.

    Raises:
        OSError: If the file system cannot hold the file, with its reason.
        TypeError: For a type that is not plain data.
    """
    local = local_path(path)
    if local is not None:
        with _replaced(local) as beside, beside.open("wb") as file:
            _save(saved, file)
            file.flush()
            os.fsync(file.fileno())
            if plain_data:
                _check_types(beside, path)
        return
    data = to_bytes(saved, path, plain_data=plain_data)
    fs, place = url_to_fs(path)
    fs.makedirs(fs._parent(place), exist_ok=True)
    with fs.transaction, fs.open(place, "wb") as file:
        file.write(data)


def read_file(path: str) -> Any:
    """Reads what `write_file` wrote, to the CPU; executes nothing that is in the file."""
    fs, place = _open_fs(path)
    with fs.open(place, "rb") as file:
        return torch.load(file, map_location="cpu", weights_only=True)


def to_bytes(saved: Any, what: str, *, plain_data: bool = True) -> memoryview:
    """Returns what `write_file` would write; `what` names it in the error's message."""
    data = io.BytesIO()
    _save(saved, data)
    if plain_data:
        data.seek(0)
        _check_types(data, what)
    return data.getbuffer()


def from_bytes(data: bytes) -> Any:
    """Returns what `to_bytes` was given, on the CPU."""
    return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)


def touch_file(path: str) -> None:
    """Makes an empty file, and missing folders."""
    fs, place = _open_fs(path)
    fs.makedirs(fs._parent(place), exist_ok=True)
    fs.pipe_file(place, b"")


def find_file(path: str) -> None:
    """Does nothing if this process sees the file.

    Raises:
        FileNotFoundError: If not.
    """
    fs, place = _open_fs(path)
    fs.info(place)


def names_in(folder: str) -> list[str]:
    """Returns the names of what is in a folder; none if there is no such folder."""
    fs, place = _open_fs(folder)
    return [entry.rstrip("/").rpartition("/")[2] for entry in fs.ls(place, detail=False)] if fs.isdir(place) else []


def remove_folder(folder: str) -> None:
    """Removes a folder and all that is in it; an object store has no empty folders, and nothing to remove then."""
    fs, place = _open_fs(folder)
    with contextlib.suppress(FileNotFoundError):
        fs.rm(place, recursive=True)


def remove_leftovers(path: str) -> None:
    """Removes what a writer of this path has left behind that was killed."""
    local = local_path(path)
    if local is not None and local.parent.is_dir():
        for found in local.parent.iterdir():
            if found.name.startswith(_hidden(local)) and found.suffix == ".incomplete":
                found.unlink(missing_ok=True)


def local_path(path: str) -> Path | None:
    """Returns the path on this machine, absolute; None for a URL of another file system."""
    scheme, found, rest = path.partition("://")
    if found and scheme not in ("file", "local"):
        return None
    return Path(rest if found else path).absolute()


def _open_fs(path: str) -> tuple[Any, str]:
    local = local_path(path)
    fs, place = url_to_fs(path) if local is None else (LocalFileSystem(), os.fspath(local))
    fs.invalidate_cache()  # other processes write there, too
    return fs, place


@contextlib.contextmanager
def _replaced(path: Path) -> Iterator[Path]:
    """Gives a path to write to, and puts what is there in the place of `path` at the end.

    It lies in the same folder, and so on the same file system, where a rename is one step.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(os.fspath(path))
    beside = path.with_name(f"{_hidden(path)}{secrets.token_hex(4)}.incomplete")
    try:
        yield beside
        beside.replace(path)
        _sync_folder(path.parent)
    finally:
        beside.unlink(missing_ok=True)


def _hidden(path: Path) -> str:
    """Returns how the names of this path's incomplete files begin; short, for the path's own name may be as long as can be."""
    return f".{hashlib.sha256(os.fsencode(path.name)).hexdigest()[:16]}-"


def _sync_folder(folder: Path) -> None:
    """Lets the disk have the folder's entries; a rename may be forgotten in a power failure until then."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # some network file systems cannot
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _save(saved: Any, file: IO[bytes]) -> None:
    try:
        torch.save(saved, file)
    except RuntimeError as error:
        # torch's writer says "unexpected pos" where the operating system said "No space left on device".
        reason: BaseException | None = error
        while reason is not None and not isinstance(reason, OSError):
            reason = reason.__context__
        if reason is None:
            raise
        raise reason from None


def _check_types(file: Path | IO[bytes], what: str) -> None:
    if refused := get_unsafe_globals_in_checkpoint(file):
        raise TypeError(f"{what} must be made of tensors, numbers, strings, lists and dicts: it holds {', '.join(refused)}")
