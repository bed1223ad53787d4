"""Many checks on few processes: on a GPU each process makes a context, which takes seconds."""

import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch.distributed as dist

from helpers.ranks import RankError, run_ranks


def failures_of(
    run: Callable[..., None], names: Iterable[str], world_size: int, *args: Any, timeout: float, backend: str = "gloo"
) -> dict[str, str]:
    """Runs named checks one after the other on the same ranks, and gives those that failed, each with its error.

    Ranks have parted once a check has failed, so the ones after it run on new ranks.

    Args:
        run: called with `(rank, world_size, names, begin, *args)`; for each of the names it calls `begin` and then the check.
        names: of the checks.
        world_size: number of ranks.
        args: passed on, pickled.
        timeout: seconds for all checks that run on the same ranks.
        backend: of the ranks' process group.
    """
    left, failed = list(names), {}
    with tempfile.TemporaryDirectory() as folder:
        begun = Path(folder) / "begun"
        while left:
            begun.write_text(left[0])
            try:
                run_ranks(run, world_size, left, _Begin(begun), *args, timeout=timeout, backend=backend)
                break
            except (RankError, TimeoutError) as error:
                name = begun.read_text()
                failed[name] = str(error)
                left = left[left.index(name) + 1 :]
    return failed


class _Begin:
    """Notes which check has begun, so that it is known even if the ranks hang or crash."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __call__(self, name: str) -> None:
        dist.barrier()  # else a rank that is done would begin the next check while this one fails elsewhere
        self._path.write_text(name)
