"""Mean gradients at eight bits: each element is quantised twice, whatever the number of ranks."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lightning_accel.algorithms.base import Algorithm, BoundAlgorithm, Context, GradBucket, check_average, register_algorithm
from lightning_accel.algorithms.bucket_plans import BucketPlans
from lightning_accel.codecs import check_codec
from lightning_accel.topology import Hierarchical, check_hierarchical


@register_algorithm("bytegrad")
@dataclass(frozen=True)
class ByteGrad(Algorithm):
    """Every rank gets the mean of all ranks' gradients, sent as codes of about one byte an element.

    g <- Q(1/n sum_r Q(g_r))

    Q codes blocks of 512 elements of one parameter, each with its own scale (`int8`: scale = absmax/127, round half to even).
    A rank owns 1/n of the blocks: it receives their codes from all (all_to_all), sums them in rank order in float32, divides,
    encodes once more, and sends the result to all (all_gather). All ranks end bit-identical.

    Source: ByteGrad of Bagua (Gan et al. 2021, arXiv:2107.01499). Differs in the grid: Bagua has one minimum and maximum for
    1/n of a bucket (`minmax_uint8` keeps its formula, by block); and results do not depend on DDP's buckets.

    Cost a step for each rank: about 2 (n-1)/n bytes an element, against 8 (n-1)/n for float32; two messages to every other
    rank a bucket, one if there are two ranks; memory for the gradients' code, twice. On a single process it does nothing.

    Fails when: an element is NaN or Inf; then its block is NaN on all ranks, which a gradient scaler sees everywhere alike.
    Elements smaller than 1/254 of the largest in their block become zero.

    Args:
        codec: "int8", "minmax_uint8", "fp16", "bf16" or "none".
        hierarchical: True, False, or "auto": when there are several nodes with equally many ranks, more than one, on each.
            Then nothing is quantised inside a node.
        average: the mean; False leaves the sum.

    Example:
        >>> ByteGrad().codec
        'int8'
    """

    codec: str = "int8"
    hierarchical: Hierarchical = "auto"
    average: bool = True

    def __post_init__(self) -> None:
        check_codec(self.codec)
        check_hierarchical(self.hierarchical)
        check_average(self.average)

    def bind(self, context: Context) -> BoundAlgorithm:
        """Makes the flat or the hierarchical form, as the nodes allow. Collective."""
        return _ByteGrad(context, self)


class _ByteGrad(BoundAlgorithm):
    def __init__(self, context: Context, options: ByteGrad) -> None:
        super().__init__(context)
        hierarchical = context.communicator.topology.use_hierarchy(options.hierarchical)
        self._plans = BucketPlans(context, options.codec, hierarchical=hierarchical)
        self._divisor = context.communicator.world_size if options.average else 1

    def reduce_gradients(self, bucket: GradBucket, label: str) -> torch.futures.Future[torch.Tensor]:
        if self.communicator.world_size == 1:
            return super().reduce_gradients(bucket, label)
        return self._plans.all_reduce(bucket, label, self._divisor)
