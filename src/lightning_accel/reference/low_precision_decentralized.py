"""low_precision_decentralized: three estimates of a ring's weights, kept equal everywhere by the same quantised differences."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_accel.reference.codecs import quantise, value_dtype
from lightning_accel.reference.weights import consensus, mean


class LowPrecisionDecentralized:
    """The estimates w, L and R of all ranks r, by parameter; L and R are of ranks r - 1 and r + 1 (of two ranks: the other).

    d = (x - w) + ((L - w) + (R - w)) / 3;   L += Q(d of r - 1), R += Q(d of r + 1), w += Q(d);   x = w

    Arithmetic is float32, or float64 for float64; Q cuts each parameter into blocks from its first element on. By nodes, the
    parameters of one arithmetic follow one another in a buffer, which is padded to a multiple of the world size; ranks of a node
    have equal shares of it, and each share begins a new block.

    Args:
        weights: Weights of each parameter, equal on all ranks.
        world_size: Number of ranks.
        codec: Q.
        nodes: Ranks of each node where it is hierarchical: their mean is x, and the ring is one of nodes; None is flat.
    """

    def __init__(
        self, weights: Sequence[Tensor], world_size: int, codec: str = "int8", *, nodes: Sequence[Sequence[int]] | None = None
    ) -> None:
        self.codec = codec
        self.nodes = nodes if nodes is not None else [[rank] for rank in range(world_size)]
        self._pieces = _pieces(weights, len(self.nodes[0]), world_size)
        self.own: list[list[Tensor]]
        self.left: list[list[Tensor]]
        self.right: list[list[Tensor]]
        self._reset(weights)

    def consensus(self, weights: Sequence[Sequence[Tensor]]) -> list[Tensor]:
        """Returns what every rank holds after a consensus on `weights`, by parameter; the estimates become the same."""
        agreed = consensus([[_widened(tensor) for tensor in own] for own in weights], self.nodes)
        rounded = [value.to(like.dtype) for value, like in zip(agreed, weights[0], strict=True)]
        self._reset(rounded)
        return rounded

    def exchange(self, weights: Sequence[Sequence[Tensor]]) -> list[list[Tensor]]:
        """Returns what each rank holds after an exchange of `weights`, by parameter."""
        n = len(self.nodes)
        by_node = [
            [mean([_widened(tensor) for tensor in tensors]) for tensors in zip(*(weights[rank] for rank in node), strict=True)]
            for node in self.nodes
        ]
        if n > 1:
            messages = [
                [
                    self._quantised((x - w) + ((left - w) + (right - w)) / 3, pieces)
                    for x, w, left, right, pieces in zip(
                        by_node[m], self.own[m], self.left[m], self.right[m], self._pieces, strict=True
                    )
                ]
                for m in range(n)
            ]
            self.left = [_sums(self.left[m], messages[(m - 1) % n]) for m in range(n)]
            self.right = [_sums(self.right[m], messages[(m + 1) % n]) for m in range(n)]
            self.own = by_node = [_sums(self.own[m], messages[m]) for m in range(n)]
        results: list[list[Tensor]] = [[] for _ in weights]
        for m, node in enumerate(self.nodes):
            for rank in node:
                results[rank] = [x.to(like.dtype) for x, like in zip(by_node[m], weights[rank], strict=True)]
        return results

    def _reset(self, weights: Sequence[Tensor]) -> None:
        values = [_widened(tensor) for tensor in weights]
        self.own = [values for _ in self.nodes]
        self.left, self.right = list(self.own), list(self.own)

    def _quantised(self, values: Tensor, pieces: Sequence[int]) -> Tensor:
        parts = values.flatten().to(value_dtype(self.codec, values.dtype)).split_with_sizes(list(pieces))
        return torch.cat([quantise(part, self.codec) for part in parts]).to(values.dtype).reshape(values.shape)


def _pieces(weights: Sequence[Tensor], shares: int, world_size: int) -> list[list[int]]:
    """Returns the number of elements of each parameter in each of the shares."""
    pieces = []
    for tensor in weights:
        alike = [other for other in weights if _widened(other).dtype == _widened(tensor).dtype]
        total = -(-sum(other.numel() for other in alike) // world_size) * world_size
        begin = 0
        for other in alike:
            if other is tensor:
                break
            begin += other.numel()
        edges = [min(max(k * (total // shares), begin), begin + tensor.numel()) for k in range(shares + 1)]
        pieces.append([edges[k + 1] - edges[k] for k in range(shares)])
    return pieces


def _sums(estimates: Sequence[Tensor], messages: Sequence[Tensor]) -> list[Tensor]:
    return [estimate + message for estimate, message in zip(estimates, messages, strict=True)]


def _widened(tensor: Tensor) -> Tensor:
    return tensor.to(torch.float64 if tensor.dtype == torch.float64 else torch.float32)
