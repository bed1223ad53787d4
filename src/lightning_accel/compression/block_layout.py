"""How parameters are cut into blocks, and which rank owns which block.

A *block* is a unit of `BLOCK_NUMEL` elements; the last block of a parameter may be shorter. A *span* is a sequence of consecutive
blocks of one parameter that one rank owns. A *scale group*, the elements that share a scale, is never larger than a block.

Results must not depend on how DDP fills its buckets, so ownership is a function of the parameters alone. Each parameter is dealt
to the ranks in spans of equally many blocks; the left-over blocks go to one rank each, beginning after the last rank that got one
of the parameter before. So ranks own equally many blocks of the model, give or take one, and of any sequence of parameters, give
or take two.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lightning_accel.native import BLOCK_NUMEL


@dataclass(frozen=True)
class OwnedSpan:
    """A span: consecutive blocks of one parameter that one rank owns.

    Attributes:
        owner: Rank that owns the span, in the group that shares the layout.
        start: First element in the parameter, a multiple of `BLOCK_NUMEL`.
        numel: Number of elements.
        place: First element in the concatenation of all parameters.
        owned_place: First element in the concatenation of all spans of the owner.
    """

    owner: int
    start: int
    numel: int
    place: int
    owned_place: int


def num_blocks(numel: int) -> int:
    """Returns the number of blocks of a parameter with `numel` elements."""
    return -(-numel // BLOCK_NUMEL)


class Layout:
    """Deals a model's blocks to ranks.

    Args:
        numels: Number of elements of each parameter, in the order of `named_parameters`, the same on all ranks.
        num_owners: Number of ranks that own blocks.

    Attributes:
        numel: Number of elements of all parameters.
        owned_numels: Number of elements that each rank owns.
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
        """Returns the spans of a parameter (its index in `numels`) in the order of its elements, without empty spans."""
        return self._spans[parameter]

    def share(self, owner: int, num_owners: int) -> Layout:
        """Returns a layout that deals one owner's spans again, each as a parameter of its own.

        Hierarchical algorithms need it: the ranks of a node share each parameter, and ranks of equal local rank share one such
        part among the nodes.
        """
        return Layout([sum(span.numel for span in spans if span.owner == owner) for spans in self._spans], num_owners)

    def _deal(self, numel: int, first_owner: int) -> list[OwnedSpan]:
        """Deals the blocks of a parameter in spans; left-over blocks go to `first_owner` and the ranks after it, one each."""
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
