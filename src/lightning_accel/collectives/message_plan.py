"""Messages of one tensor in a two-shot all_reduce."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from lightning_accel.compression.block_layout import Layout, OwnedSpan
from lightning_accel.compression.plan import Plan


@dataclass(frozen=True)
class Piece:
    """A run of a parameter's blocks, and where it lies in a tensor: what a message is made of.

    Attributes:
        tensor_offset: its first element in the tensor.
        span: what it is; its owner sums it.
    """

    tensor_offset: int
    span: OwnedSpan


def pieces_of(layout: Layout, places: Sequence[tuple[int, int]]) -> list[Piece]:
    """Pieces of a tensor that holds parameters: pairs of a place in the layout and the first element in the tensor."""
    return [Piece(offset + span.start, span) for parameter, offset in places for span in layout.spans(parameter)]


@dataclass(frozen=True)
class TwoShotPlan:
    """Messages of one tensor in a compressed all_reduce, for one rank.

    All messages have `stride_bytes`, that of the largest: the deal is even, so padding is small, and collectives with equal
    parts are what every backend does best.

    Attributes:
        everything: all pieces of the tensor; rank k's lie from k * stride_bytes on, or all in one message if `is_whole`.
        own: the pieces this rank sums, as one message from 0 on.
        stride_bytes: bytes of a message.
        is_whole: whether every rank sums all pieces.
    """

    everything: Plan
    own: Plan
    stride_bytes: int
    is_whole: bool

    @classmethod
    def build(
        cls, codec: str, dtype: torch.dtype, pieces: Sequence[Piece], world_size: int, rank: int, *, scatter: bool = False
    ) -> TwoShotPlan:
        """Plans messages from pieces; each rank's pieces stand in its message in the order given.

        Up to two ranks, each sums all pieces, unless `scatter` asks for shares.
        """
        if world_size <= 2 and not scatter:
            whole = _plan(codec, dtype, pieces, [piece.span.place for piece in pieces])
            return cls(whole, whole, whole.wire_bytes, is_whole=True)
        by_owner = [[piece for piece in pieces if piece.span.owner == owner] for owner in range(world_size)]
        messages = [_plan(codec, dtype, part, [piece.span.owned_place for piece in part]) for part in by_owner]
        stride_bytes = max(message.wire_bytes for message in messages)
        in_order = [piece for part in by_owner for piece in part]
        wire_offsets = [k * stride_bytes + offset for k, message in enumerate(messages) for offset in message.wire_offsets]
        everything = _plan(codec, dtype, in_order, [piece.span.place for piece in in_order], wire_offsets)
        return cls(everything, messages[rank], stride_bytes, is_whole=False)


def _plan(
    codec: str, dtype: torch.dtype, pieces: Sequence[Piece], residual_offsets: list[int], wire_offsets: list[int] | None = None
) -> Plan:
    tensor_offsets = [piece.tensor_offset for piece in pieces]
    return Plan(codec, dtype, tensor_offsets, [piece.span.numel for piece in pieces], wire_offsets, residual_offsets)
