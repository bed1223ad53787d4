# mypy: disable-error-code="misc"
"""Lightning's writers of checkpoints: its own is made safe, and one that writes in the background is recognised.

Lightning's own writes to the folder for temporary files and moves the file from there. Where that folder is on another file
system, moving is copying: the path holds a part of the file meanwhile, and for good if the process is killed.
"""

from __future__ import annotations

import os
from functools import cache
from typing import TYPE_CHECKING, Any

from lightning_accel.checkpoint.files import local_path, write_file

if TYPE_CHECKING:
    # A strategy, or a writer.
    _Base = Any
else:
    _Base = object

_LIGHTNINGS_OWN = {f"{root}.plugins.io.torch_io" for root in ("lightning.fabric", "lightning_fabric")}


class WholeFiles(_Base):
    """Base of a strategy whose checkpoints, by Lightning's own writer, are whole: a path has the old file or the new one."""

    @property
    def checkpoint_io(self) -> Any:
        """Writer and reader of checkpoints."""
        return _with_whole_files(super().checkpoint_io)

    @checkpoint_io.setter
    def checkpoint_io(self, checkpoint_io: Any) -> None:
        self._checkpoint_io = checkpoint_io


def returns_early(checkpoint_io: object) -> bool:
    """Whether the writer may return before the checkpoint is complete: it is an AsyncCheckpointIO."""
    return _is_a("AsyncCheckpointIO", checkpoint_io)


class _WholeFileIO(_Base):
    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        if storage_options is not None or local_path(os.fspath(path)) is None:
            super().save_checkpoint(checkpoint, path, storage_options)
        else:
            write_file(os.fspath(path), checkpoint, plain_data=False)

    def __reduce__(self) -> Any:
        return _with_whole_files, (type(self).__bases__[1](),)  # pickle finds no class that is made on the way


def _with_whole_files(checkpoint_io: Any) -> Any:
    """Returns a writer of whole files in the place of Lightning's own, which others may wrap; any other as it is."""
    if type(checkpoint_io).__module__ in _LIGHTNINGS_OWN:
        own: Any = type(checkpoint_io)
        return _whole_file_io(own)()
    if _is_a("_WrappingCheckpointIO", checkpoint_io):
        checkpoint_io._checkpoint_io = _with_whole_files(checkpoint_io._checkpoint_io)
    return checkpoint_io


@cache
def _whole_file_io(own: Any) -> Any:
    return type(own.__name__, (_WholeFileIO, own), {})


def _is_a(name: str, value: object) -> bool:
    return any(cls.__name__ == name for cls in type(value).__mro__)
