"""How parameters are cut in blocks, and which rank owns which block.

Results must not depend on how DDP fills its buckets, so ownership is a function of the parameters alone: a parameter's blocks
(of `BLOCK_NUMEL` elements, the last may be shorter) go to the ranks in contiguous runs, and the blocks that are left over go
on where the parameter before stopped. So every rank owns the same number of blocks of the whole model, give or take one, and
of any stretch of consecutive parameters, give or take two.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lightning_accel.codecs import BLOCK_NUMEL


@dataclass(frozen=True)
class Run:
    """Consecutive blocks of one parameter that one rank owns.

    Attributes:
        owner: rank in the group the blocks were dealt to.
        start: first element in the parameter, a multiple of `BLOCK_NUMEL`.
        numel: elements.
    """

    owner: int
    start: int
    numel: int


def num_blocks(numel: int) -> int:
    """Blocks of a tensor with `numel` elements."""
    return -(-numel // BLOCK_NUMEL)


def deal(numel: int, first_owner: int, num_owners: int) -> list[Run]:
    """Deals a parameter's blocks out to `num_owners` ranks, the left-over ones from `first_owner` on.

    Returns runs in the order of the parameter's elements, empty ones left out.
    """
    each, left_over = divmod(num_blocks(numel), num_owners)
    runs = []
    start = 0
    for owner in range(num_owners):
        blocks = each + ((owner - first_owner) % num_owners < left_over)
        end = min(start + blocks * BLOCK_NUMEL, numel)
        if end > start:
            runs.append(Run(owner, start, end - start))
        start = end
    return runs


class Layout:
    """Ownership of a model's blocks by `num_owners` ranks, and inside each rank's part by `num_inner` others.

    The inner deal is what hierarchical algorithms need: ranks of a node share a parameter, and the ranks of equal local rank
    share such a part among the nodes.

    Args:
        numels: elements of each parameter, in the order of `named_parameters`, the same on all ranks.
        num_owners: ranks to deal to.
        num_inner: ranks to deal each part to.
    """

    def __init__(self, numels: Sequence[int], num_owners: int, num_inner: int = 1) -> None:
        self.numels = tuple(numels)
        self.num_owners = num_owners
        self.num_inner = num_inner
        dealt_blocks = 0
        self._first_block = []
        for numel in self.numels:
            self._first_block.append(dealt_blocks)
            dealt_blocks += num_blocks(numel)

    def runs(self, parameter: int) -> list[Run]:
        """Runs of a parameter (its place in `numels`) for the owners."""
        return deal(self.numels[parameter], self._first_block[parameter] % self.num_owners, self.num_owners)

    def inner_runs(self, parameter: int, run: Run) -> list[Run]:
        """A run cut again for the inner ranks; `start` counts from the run's first element.

        Left-over blocks go on where the owner's run before stopped, so that each owner's part is dealt evenly too.
        """
        each, left_over = divmod(self._first_block[parameter], self.num_owners)
        owned_before = each + (run.owner < left_over)
        return deal(run.numel, owned_before % self.num_inner, self.num_inner)
