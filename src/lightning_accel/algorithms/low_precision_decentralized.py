"""Exchanges weights at eight bits with the two neighbours on a ring."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from lightning_accel.algorithms.base import Algorithm, BoundAlgorithm, Context
from lightning_accel.algorithms.common.flat_weights import segments
from lightning_accel.algorithms.common.option_checks import check_communication_interval, check_hierarchical
from lightning_accel.algorithms.common.weight_exchange import WeightExchange
from lightning_accel.algorithms.registry import register_algorithm
from lightning_accel.collectives.ring import Ring
from lightning_accel.compression.codecs import check_codec
from lightning_accel.transport.scratch import Scratch
from lightning_accel.transport.topology import Hierarchical


@register_algorithm("low_precision_decentralized")
@dataclass(frozen=True)
class LowPrecisionDecentralized(Algorithm):
    """Lets every rank step with its own gradient, and tell its two neighbours at eight bits how its weights have changed.

    d = x + L/3 + R/3 - 5w/3;   L += Q(d of the left), R += Q(d of the right), w += Q(d);   x = w

    Each rank keeps three estimates: w of its own weights, L and R of its neighbours'. All begin as the common weights. As the
    same messages are added everywhere, w[r] == R[r-1] == L[r+1] to the bit, always. So a rank knows its neighbours' weights
    although only differences travel, and d takes it towards the mean of the three. Since a step's progress is x - w, the
    exchange comes between two steps: when a round begins, before its forward, which waits for it.

    Source: DCD-PSGD (Tang et al. 2018, arXiv:1803.06443), as in Bagua (Gan et al. 2021, arXiv:2107.01499). It differs in the
    grid (blocks of 512 elements of one parameter), and d is (x - w) + ((L - w) + (R - w)) / 3, which is zero where all agree.

    Cost of a communication for each rank: 2 codes of the weights, about 2 bytes an element against 8 (n-1)/n for an all_reduce
    of float32 gradients (two ranks: 1 against 4); 2 messages, whatever n. A rank waits for its neighbours only. Memory: four
    times the weights, float16 and bfloat16 as float32, and up to three codes; once more during a consensus. On a single
    process it does nothing.

    Fails when: the codec is coarse: elements of d below half a step of Q's grid (int8: 1/254 of the largest in their block) are
    lost, not sent later; int4 and sign lose most of a step. Or n is large: what one rank learns takes n/2 communications to
    reach the farthest one. An element that is NaN or Inf makes its block NaN, on this rank and then on all. `ModelCheckpoint`
    and validation see the mean of all ranks (consensus), from which all go on.

    Args:
        codec: Codec of what travels: "int8", "minmax_uint8", "int4", "sign", "fp16", "bf16" or "none".
        communication_interval: Number of rounds from one communication to the next; the first round communicates.
        hierarchical: Whether ranks of a node combine what they have first, uncompressed, so that less travels between nodes:
            True, False, or "auto": when there are several nodes with equally many ranks, more than one, on each.

    Example:
        >>> LowPrecisionDecentralized().codec
        'int8'
    """

    codec: str = "int8"
    communication_interval: int = 1
    hierarchical: Hierarchical = "auto"

    def __post_init__(self) -> None:
        check_codec(self.codec)
        check_communication_interval(self.communication_interval)
        check_hierarchical(self.hierarchical)

    def bind(self, context: Context) -> BoundAlgorithm:
        """Makes the flat or the hierarchical form, as the nodes allow. Collective."""
        return _LowPrecisionDecentralized(context, self)


class _LowPrecisionDecentralized(WeightExchange):
    def __init__(self, context: Context, options: LowPrecisionDecentralized) -> None:
        super().__init__(context, options.hierarchical, widen=True)
        self._options = options
        self._begins_anew = True
        self.rings: list[Ring] = []
        for share, parts in zip(self._shares(), self.weights.parts, strict=True):
            start = self.intra_node.rank * share.numel()
            self.rings.append(Ring.of(options.codec, share, *segments(parts, start, start + share.numel())))

    def before_forward(self) -> None:
        if self._begins_anew:
            # All ranks have the same weights, from DDP or from a checkpoint: there is no difference to send yet.
            self._begins_anew = False
            self._reset()
        elif self.rounds % self._options.communication_interval == 0:
            self.start_exchange()
            self.finish_exchange()

    def exchange(self, buffer: int, share: torch.Tensor, scratch: Scratch) -> None:
        self.rings[buffer].step(share, self.inter_node, scratch)

    def consensus(self) -> None:
        super().consensus()
        # At once, not when the next round begins: an optimizer may step before.
        self._reset()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self._begins_anew = True

    def _reset(self) -> None:
        self.weights.gather(self.buffers)
        for ring, share in zip(self.rings, self._shares(), strict=True):
            ring.reset(share)

    def _shares(self) -> list[torch.Tensor]:
        """Returns this rank's share of each buffer: its part among the ranks of a node if hierarchical, else all of it."""
        n, rank = self.intra_node.world_size, self.intra_node.rank
        return [buffer.view(n, buffer.numel() // n)[rank] for buffer in self.buffers]
