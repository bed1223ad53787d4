"""The replicas' state, as a checkpoint keeps it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lightning_accel.algorithms import BoundAlgorithm
from lightning_accel.checkpoint.random_generators import set_generators
from lightning_accel.data_parallel.replica import Replica
from lightning_accel.logs import get_log

_log = get_log(__name__)

KEY = "lightning_accel"
"""Key of our part in a checkpoint; other strategies ignore it."""

VERSION = 2
"""Version of our part and of the ranks' files."""

READABLE_VERSIONS = (1, 2)
"""Versions that can be read. In the first, ranks' states were in files alone, and layouts were not recorded."""


@dataclass(frozen=True)
class State:
    """The state of replicas that train with one algorithm, on this rank.

    Attributes:
        algorithm: Name of the algorithm.
        common: Each replica's state that is equal on all ranks.
        own: Each replica's state that is this rank's own.
        layouts: Each replica's `rank_state_layout`.
        ranks_differ: Whether weights and optimizers are each rank's own, too.
    """

    algorithm: str
    common: list[dict[str, Any]]
    own: list[dict[str, Any]]
    layouts: list[str]
    ranks_differ: bool

    @classmethod
    def of(cls, algorithm: str, replicas: Sequence[Replica]) -> State:
        """Returns the state as it is now; tensors are not copied."""
        return cls(
            algorithm,
            [replica.state_dict() for replica in replicas],
            [replica.algorithm.rank_state_dict() for replica in replicas],
            _layouts(replicas),
            any(replica.algorithm.ranks_differ for replica in replicas),
        )

    def has_own(self, world_size: int) -> bool:
        """Tells whether this rank has any state of its own beside its random generators; a single rank's optimizers are not."""
        return any(self.own) or (self.ranks_differ and world_size > 1)

    @property
    def rounds(self) -> list[int]:
        """Number of rounds that each replica has finished."""
        return [common["rounds"] for common in self.common]

    def part(self, world_size: int, generators: list[dict[str, Any]] | None = None) -> dict[str, Any]:
        """Returns our part of the checkpoint, without what each rank holds for itself; a rank that writes alone needs no more.

        Args:
            world_size: Number of ranks.
            generators: Each rank's random generators.
        """
        return {
            "version": VERSION,
            "algorithm": self.algorithm,
            "world_size": world_size,
            "replicas": self.common,
            "layouts": self.layouts,
            "generators": generators,
            "rank_files": None,
            "ranks": None,
        }


@dataclass(frozen=True)
class Restored:
    """What a checkpoint holds for this rank: read and checked, but not applied yet.

    Attributes:
        part: Our part of the checkpoint, from under `KEY`.
        rank: Rank of this process.
        world_size: Number of ranks of this run.
        own: Each replica's state that is this rank's own; None if there is none, none that fits, or none is wanted.
    """

    part: dict[str, Any]
    rank: int
    world_size: int
    own: list[dict[str, Any]] | None = None

    def apply(self, algorithm: str, replicas: Sequence[Replica]) -> bool:
        """Applies the state, once model and optimizers are restored; returns whether the algorithm's state fitted."""
        part, layouts = self.part, _layouts(replicas)
        if self.rank == 0 and (loss := self._loss(algorithm, layouts)):
            _log.warning("%s", loss)
        has_fitted = fits(part, algorithm, len(replicas))
        if has_fitted:
            for replica, common in zip(replicas, part["replicas"], strict=True):
                replica.load_state_dict(common)
        if has_fitted and self.own is not None and self._saved_layouts == layouts:
            for replica, own in zip(replicas, self.own, strict=True):
                replica.algorithm.load_rank_state_dict(own)
        else:
            reset(replicas)
        if part["generators"] is not None and part["world_size"] == self.world_size:
            set_generators(part["generators"][self.rank])
        return has_fitted

    @property
    def _saved_layouts(self) -> list[str]:
        layouts: list[str] = self.part.get("layouts") or [BoundAlgorithm.rank_state_layout] * len(self.part["replicas"])
        return layouts

    def _loss(self, algorithm: str, layouts: list[str]) -> str | None:
        """Returns what the checkpoint holds and this run does not take, and why; None if it takes everything."""
        part = self.part
        saved, given = len(part["replicas"]), len(layouts)
        if not fits(part, algorithm, given):
            numbers = ("", "") if saved == given else (f" on {saved} modules", f" on {given}")
            return (
                f"the checkpoint is of algorithm {part['algorithm']!r}{numbers[0]}, this run uses {algorithm!r}{numbers[1]}: its "
                "state starts anew"
            )
        if part["generators"] is None:
            return (
                "the checkpoint was written by rank 0 alone, when a run failed: what each rank held for itself (residuals, "
                "optimizers, random generators) starts anew"
            )
        if part["rank_files"] is None and part.get("ranks") is None:
            return None
        if part["world_size"] != self.world_size:
            return (
                f"the checkpoint is of {part['world_size']} ranks, this run has {self.world_size}: model and optimizers are "
                "those of rank 0, what each rank held for itself (residuals, random generators) starts anew"
            )
        if self.own is None:
            return (
                "restore_rank_state=False: model and optimizers are those of rank 0, what else each rank held for itself "
                "(residuals) starts anew"
            )
        if self._saved_layouts != layouts:
            return (
                f"the checkpoint's residuals are laid out for {'; '.join(self._saved_layouts)}, this run's for "
                f"{'; '.join(layouts)}: they start anew"
            )
        return None


def reset(replicas: Sequence[Replica]) -> None:
    """Starts anew what each rank holds for itself, where a checkpoint has nothing of the kind."""
    for replica in replicas:
        replica.algorithm.reset_rank_state()


def fits(part: dict[str, Any], algorithm: str, replicas: int) -> bool:
    """Whether a checkpoint's part belongs to this algorithm and number of replicas."""
    return (part["algorithm"], len(part["replicas"])) == (algorithm, replicas)


def _layouts(replicas: Sequence[Replica]) -> list[str]:
    return [replica.algorithm.rank_state_layout for replica in replicas]
