"""Where a checkpoint keeps what each rank holds for itself: in a file of each rank beside it, or inside it.

    last.ckpt
    last.ckpt.ranks/step-1200-9f3c2a1b/rank-0-of-2.pt
                                       rank-1-of-2.pt

The checkpoint names the folder that belongs to it. All ranks write at once, and each rank reads its own file alone. Where such
files cannot be, rank 0 gathers the ranks' states and writes them into the checkpoint.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch.distributed as dist

from lightning_accel.checkpoint import files
from lightning_accel.checkpoint.agreement import all_gather, gather_on_first_rank, raise_together, rank_and_world_size
from lightning_accel.logs import get_log

_log = get_log(__name__)

RankFiles = Literal["auto", "beside", "inside"]
"""Where the ranks' states go: "beside" the checkpoint, "inside" it, or "auto": beside it if all ranks see the same files there,
else inside."""

REMEDY = (
    "move and copy a checkpoint together with its folder of files; if they are lost, restore_rank_state=False goes on with the "
    "model and rank 0's optimizers"
)


class Inside:
    """The ranks' states are in the checkpoint; rank 0 needs memory for all of them."""

    def save(self, own: dict[str, Any], group: dist.ProcessGroup | None) -> dict[str, Any]:
        """Gathers the states, and returns what rank 0 writes into the checkpoint. Collective."""
        data = raise_together(lambda: bytes(files.to_bytes(own, "a rank's state")), "copy its state", group)
        return {"ranks": [files.from_bytes(data) for data in gather_on_first_rank(data, group)]}


@dataclass(frozen=True)
class Beside:
    """Each rank's state is in a file.

    Attributes:
        path: Path or URL of the checkpoint.
        folder: Name of the folder for this save's files.
        rank: Rank of this process.
        world_size: Number of ranks.
    """

    path: str
    folder: str
    rank: int
    world_size: int

    def save(self, own: dict[str, Any], group: dist.ProcessGroup | None) -> dict[str, Any]:
        """Writes the files, and returns what rank 0 writes into the checkpoint. Collective."""
        file = self._file(self.rank)
        try:
            raise_together(lambda: files.write_file(file, self._identity | own), f"write its file of {self.path}", group)
        except Exception:
            self._discard()
            raise
        return {"rank_files": self.folder}

    def load(self, expected: dict[str, Any]) -> dict[str, Any]:
        """Reads this rank's file.

        Args:
            expected: Entries that the file has if it is of the checkpoint's save.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If it is torn, or of another save.
        """
        file = self._file(self.rank)
        try:
            own: dict[str, Any] = files.read_file(file)
        except FileNotFoundError:
            raise FileNotFoundError(f"{file} is missing: {REMEDY}") from None
        except Exception as error:
            raise ValueError(f"{file} is torn: {type(error).__name__}: {error}; {REMEDY}") from error
        expected = self._identity | expected
        got = {name: own.get(name) for name in expected} if isinstance(own, dict) else own
        if got != expected:
            raise ValueError(f"{file} does not belong to {self.path}, which needs {expected}: got {got}; {REMEDY}")
        return own

    def find_obstacle(self, group: dist.ProcessGroup | None) -> str | None:
        """Makes the folder, and returns the reason if the ranks' files cannot be there. Collective."""
        first = self._file(0)

        def write() -> None:
            if self.rank == 0:
                files.touch_file(first)

        def see() -> None:
            files.find_file(first)

        for action in (write, see):
            for rank, reason in enumerate(all_gather(_failure_of(action), group)):
                if reason is not None:
                    self._discard()
                    return f"rank {rank} could not {action.__name__} {first}: {reason}"
        return None

    @property
    def _identity(self) -> dict[str, Any]:
        return {"folder": self.folder, "rank": self.rank, "world_size": self.world_size}

    def _file(self, rank: int) -> str:
        return f"{_folders(self.path)}/{self.folder}/rank-{rank}-of-{self.world_size}.pt"

    def _discard(self) -> None:
        if self.rank == 0:
            _remove(self.path, lambda folder: folder == self.folder)


def choose_place(path: str, folder: str, rank_files: RankFiles, group: dist.ProcessGroup | None) -> Inside | Beside:
    """Returns where a save's states go. Collective.

    Args:
        path: Path or URL of the checkpoint.
        folder: Name for the folder of files, the same on all ranks.
        rank_files: See `RankFiles`.
        group: Process group of the ranks; None is the default one.

    Raises:
        RuntimeError: On all ranks, if the files have to be beside the checkpoint and cannot be.
    """
    rank, world_size = rank_and_world_size(group)
    if rank_files == "inside" or world_size == 1:
        return Inside()
    beside = Beside(path, folder, rank, world_size)
    obstacle = beside.find_obstacle(group)
    if obstacle is None:
        return beside
    if rank_files == "beside":
        raise RuntimeError(
            f"{obstacle}. rank_files='beside' needs a place for files that all ranks share; use 'auto' or 'inside' to gather the "
            "ranks' states in the checkpoint"
        )
    _log.info("rank 0 gathers the ranks' states in the checkpoint: %s", obstacle)
    return Inside()


def load_own(path: str, part: dict[str, Any], rank: int) -> dict[str, Any] | None:
    """Returns what a rank held for itself when the checkpoint was saved; None if the checkpoint has nothing of the kind.

    Args:
        path: Path or URL of the checkpoint.
        part: Our part of the checkpoint.
        rank: Rank, among as many as there were.

    Raises:
        FileNotFoundError: If the rank's file is missing.
        ValueError: If it is torn, or of another save.
    """
    if part.get("ranks") is not None:
        own: dict[str, Any] = part["ranks"][rank]
        return own
    if part["rank_files"] is None:
        return None
    local = files.local_path(path)  # a link, such as Lightning's last.ckpt, has its files where it points to
    beside = Beside(path if local is None else os.path.realpath(local), part["rank_files"], rank, part["world_size"])
    return beside.load({"version": part["version"], "rounds": [common["rounds"] for common in part["replicas"]]})


def remove_rank_files(path: str, *, but: str | None = None) -> None:
    """Removes the ranks' files of a checkpoint, and what a killed writer left behind; logs it if that fails.

    Args:
        path: Path or URL of the checkpoint.
        but: Folder to keep.
    """
    _remove(path, lambda folder: folder.startswith("step-") and folder != but)


def check_rank_files(value: object) -> None:
    """Refuses anything but a `RankFiles`.

    Raises:
        ValueError: For another value.
    """
    if value not in get_args(RankFiles):
        raise ValueError(f"rank_files must be one of {', '.join(map(repr, get_args(RankFiles)))}: got {value!r}")


def _remove(path: str, is_to_go: Callable[[str], bool]) -> None:
    folders = _folders(path)
    try:
        files.remove_leftovers(path)
        found = files.names_in(folders)
        for folder in filter(is_to_go, found):
            files.remove_folder(f"{folders}/{folder}")
        if found and not files.names_in(folders):
            files.remove_folder(folders)
    except (ImportError, ValueError):
        pass  # a URL that only the user's own writer knows: there are no files of ours
    except Exception as error:  # of any file system that fsspec knows
        _log.warning("the ranks' files of a former checkpoint could not be removed: %s", error)


def _folders(path: str) -> str:
    return f"{path}.ranks"


def _failure_of(action: Callable[[], object]) -> str | None:
    try:
        action()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None
