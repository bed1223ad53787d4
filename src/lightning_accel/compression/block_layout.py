"""How parameters are cut in blocks, and which rank owns which block.

Results must not depend on how DDP fills its buckets, so ownership is a function of the parameters alone: a parameter's blocks
(of `BLOCK_NUMEL` elements, the last may be shorter) go to the ranks in contiguous spans, and the blocks that are left over go
on where the parameter before stopped. So every rank owns the same number of blocks of the whole model, give or take one, and
of any stretch of consecutive parameters, give or take two.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lightning_accel.native import BLOCK_NUMEL


@dataclass(frozen=True)
class OwnedSpan:
    """Consecutive blocks of one parameter that one rank owns.

    Attributes:
        owner: rank in the group the blocks were dealt to.
        start: first element in the parameter, a multiple of `BLOCK_NUMEL`.
        numel: elements.
        place: first element among all parameters, one behind another.
        owned_place: first element among all that the owner owns.
    """

    owner: int
    start: int
    numel: int
    place: int
    owned_place: int


def num_blocks(numel: int) -> int:
    """Blocks of a tensor with `numel` elements."""
    return -(-numel // BLOCK_NUMEL)


class Layout:
    """Ownership of a model's blocks by `num_owners` ranks.

    Args:
        numels: elements of each parameter, in the order of `named_parameters`, the same on all ranks.
        num_owners: ranks to deal to.

    Attributes:
        numel: elements of all parameters.
        owned_numels: elements that each owner owns.
    """

    def __init__(self, numels: Sequence[int], num_owners: int) -> None:
        self.numels = tuple(numels)
        self.numel = 0
        self.owned_numels = [0] * num_owners
        self._spans: list[list[OwnedSpan]] = []
        dealt_blocks = 0
        for numel in self.numels:
            self._spans.append(self._deal(numel, dealt_blocks % num_owners))
            self.numel += numel
            dealt_blocks += num_blocks(numel)

    def spans(self, parameter: int) -> list[OwnedSpan]:
        """Runs of a parameter (its place in `numels`), in the order of its elements, empty ones left out."""
        return self._spans[parameter]

    def share(self, owner: int, num_owners: int) -> Layout:
        """What an owner owns, dealt out again: of each parameter the part that is its own.

        Hierarchical algorithms need it: ranks of a node share a parameter, and the ranks of equal local rank share such a part
        among the nodes.
        """
        return Layout([sum(span.numel for span in spans if span.owner == owner) for spans in self._spans], num_owners)

    def _deal(self, numel: int, first_owner: int) -> list[OwnedSpan]:
        """Deals a parameter's blocks out in contiguous spans, the left-over ones from `first_owner` on."""
        num_owners = len(self.owned_numels)
        each, left_over = divmod(num_blocks(numel), num_owners)
        spans = []
        start = 0
        for owner in range(num_owners):
            blocks = each + ((owner - first_owner) % num_owners < left_over)
            end = min(start + blocks * BLOCK_NUMEL, numel)
            if end > start:
                spans.append(OwnedSpan(owner, start, end - start, self.numel + start, self.owned_numels[owner]))
                self.owned_numels[owner] += end - start
            start = end
        return spans
