"""The replicas' state, as a checkpoint keeps it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lightning_accel.checkpoint.random_generators import set_generators
from lightning_accel.data_parallel.replica import Replica
from lightning_accel.logs import get_log

_log = get_log(__name__)

KEY = "lightning_accel"
"""Key of our part in a checkpoint; other strategies ignore it."""

VERSION = 1
"""Version of our part and of the ranks' files."""


@dataclass(frozen=True)
class State:
    """The state of replicas that train with one algorithm, on this rank.

    Attributes:
        algorithm: Name of the algorithm.
        common: Each replica's state that is equal on all ranks.
        own: Each replica's state that is this rank's own.
        ranks_differ: Whether weights and optimizers are each rank's own, too.
    """

    algorithm: str
    common: list[dict[str, Any]]
    own: list[dict[str, Any]]
    ranks_differ: bool

    @classmethod
    def of(cls, algorithm: str, replicas: Sequence[Replica]) -> State:
        """Returns the state as it is now; tensors are not copied."""
        return cls(
            algorithm,
            [replica.state_dict() for replica in replicas],
            [replica.algorithm.rank_state_dict() for replica in replicas],
            any(replica.algorithm.ranks_differ for replica in replicas),
        )

    @property
    def needs_file(self) -> bool:
        """Whether this rank has any state of its own beside its random generators."""
        return self.ranks_differ or any(self.own)

    @property
    def rounds(self) -> list[int]:
        """Number of rounds that each replica has finished."""
        return [common["rounds"] for common in self.common]

    def part(self, world_size: int, generators: list[dict[str, Any]] | None = None, folder: str | None = None) -> dict[str, Any]:
        """Returns our part of the checkpoint; without generators and folder, one that a rank can write alone."""
        return {
            "version": VERSION,
            "algorithm": self.algorithm,
            "world_size": world_size,
            "replicas": self.common,
            "generators": generators,
            "rank_files": folder,
        }


@dataclass(frozen=True)
class Restored:
    """What a checkpoint holds for this rank: read and checked, but not applied yet.

    Attributes:
        part: Our part of the checkpoint, from under `KEY`.
        rank: Rank of this process.
        world_size: Number of ranks of this run.
        own: Each replica's state that is this rank's own; None where no file has it, or none that fits.
    """

    part: dict[str, Any]
    rank: int
    world_size: int
    own: list[dict[str, Any]] | None = None

    def apply(self, algorithm: str, replicas: Sequence[Replica]) -> bool:
        """Applies the state, once model and optimizers are restored; returns whether the algorithm's state fitted."""
        part = self.part
        has_fitted = fits(part, algorithm, len(replicas))
        if has_fitted:
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
            set_generators(part["generators"][self.rank])
        return has_fitted

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


def fits(part: dict[str, Any], algorithm: str, replicas: int) -> bool:
    """Whether a checkpoint's part belongs to this algorithm and number of replicas."""
    return (part["algorithm"], len(part["replicas"])) == (algorithm, replicas)
