"""Who sums what, and the messages of one tensor: what every collective here follows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import torch

from lightning_accel.compression.block_layout import Layout, OwnedSpan
from lightning_accel.compression.plan import Plan


@dataclass(frozen=True)
class Sums:
    """Which spans of a layout this rank sums: those it owns, or all of them where there are two ranks or one.

    Two ranks would send half of a tensor's code twice. They send all of it once and both sum all blocks: the same bits and
    bytes, and one message less to wait for.

    Attributes:
        layout: Parameters and the owners of their blocks.
        world_size: Number of ranks.
        rank: This rank.
    """

    layout: Layout
    world_size: int
    rank: int

    @property
    def is_whole(self) -> bool:
        """Whether every rank sums all spans."""
        return self.world_size <= 2

    @property
    def numel(self) -> int:
        """Elements this rank sums."""
        return self.layout.numel if self.is_whole else self.layout.owned_numels[self.rank]

    def place(self, span: OwnedSpan) -> int | None:
        """Returns the first element of a span among those this rank sums, None where another rank sums it."""
        if self.is_whole:
            return span.place
        return span.owned_place if span.owner == self.rank else None


@dataclass(frozen=True)
class Piece:
    """A span of a parameter's blocks, and where it lies in a tensor: what a message is made of.

    Attributes:
        tensor_offset: Its first element in the tensor.
        span: The span; its owner sums it.
    """

    tensor_offset: int
    span: OwnedSpan


def pieces_of(layout: Layout, places: Sequence[tuple[int, int]]) -> list[Piece]:
    """Returns the pieces of a tensor that holds parameters.

    Args:
        layout: Parameters and the owners of their blocks.
        places: Pairs of a parameter's place in the layout and its first element in the tensor.
    """
    return [Piece(offset + span.start, span) for parameter, offset in places for span in layout.spans(parameter)]


@dataclass(frozen=True)
class TwoShotPlan:
    """Messages of one tensor in a two-shot all_reduce, for one rank.

    All messages have `stride_bytes`, that of the largest: the deal is even, so padding is small, and collectives with equal
    parts are what every backend does best.

    Attributes:
        everything: All pieces of the tensor; rank k's lie from k * stride_bytes on, or all in one message if `is_whole`.
        own: The pieces this rank sums, as one message from 0 on.
        stride_bytes: Bytes of a message.
        is_whole: Whether every rank sums all pieces.
        own_numels: Elements of each piece this rank sums.
    """

    everything: Plan
    own: Plan
    stride_bytes: int
    is_whole: bool
    own_numels: tuple[int, ...]

    @classmethod
    def build(
        cls, codec: str, dtype: torch.dtype, pieces: Sequence[Piece], world_size: int, rank: int, *, scatter: bool = False
    ) -> TwoShotPlan:
        """Plans messages from pieces; each rank's pieces stand in its message in the order given.

        Args:
            codec: Codec of the messages.
            dtype: Dtype of the tensor.
            pieces: Pieces of the tensor.
            world_size: Number of ranks.
            rank: This rank.
            scatter: Whether each rank sums its own pieces even where there are two ranks (see `Sums`).
        """
        if world_size <= 2 and not scatter:
            whole = _plan(codec, dtype, pieces, [piece.span.place for piece in pieces])
            return cls(whole, whole, whole.wire_bytes, True, tuple(piece.span.numel for piece in pieces))
        by_owner = [[piece for piece in pieces if piece.span.owner == owner] for owner in range(world_size)]
        messages = [_plan(codec, dtype, part, [piece.span.owned_place for piece in part]) for part in by_owner]
        stride_bytes = max(message.wire_bytes for message in messages)
        in_order = [piece for part in by_owner for piece in part]
        wire_offsets = [k * stride_bytes + offset for k, message in enumerate(messages) for offset in message.wire_offsets]
        everything = _plan(codec, dtype, in_order, [piece.span.place for piece in in_order], wire_offsets)
        own_numels = tuple(piece.span.numel for piece in by_owner[rank])
        return cls(everything, messages[rank], stride_bytes, False, own_numels)

    @property
    def phases(self) -> tuple[str, ...]:
        """Names of the parts between which `compressed_all_reduce_steps` waits."""
        return ("encode", "sum") if self.is_whole else ("encode", "sum", "decode")

    @cached_property
    def shard(self) -> Plan:
        """The pieces this rank sums as a dense tensor, one behind another; the same message as `own`."""
        offsets = [end - numel for end, numel in zip(accumulate(self.own_numels), self.own_numels, strict=True)]
        return Plan(self.own.codec, self.own.dtype, offsets, self.own_numels, self.own.wire_offsets)

    @property
    def shard_numel(self) -> int:
        """Elements of the dense tensor."""
        return sum(self.own_numels)


def _plan(
    codec: str, dtype: torch.dtype, pieces: Sequence[Piece], residual_offsets: list[int], wire_offsets: list[int] | None = None
) -> Plan:
    tensor_offsets = [piece.tensor_offset for piece in pieces]
    return Plan(codec, dtype, tensor_offsets, [piece.span.numel for piece in pieces], wire_offsets, residual_offsets)
