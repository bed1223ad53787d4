"""Mean gradients at eight bits or fewer: each element is quantised twice, whatever the number of ranks."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import torch

from lightning_accel.algorithms.base import Algorithm, BoundAlgorithm, Context, GradBucket
from lightning_accel.algorithms.common.bucket_reducer import BucketReducer
from lightning_accel.algorithms.common.option_checks import check_average, check_hierarchical
from lightning_accel.algorithms.registry import register_algorithm
from lightning_accel.compression.codecs import check_codec, uses_feedback
from lightning_accel.transport.topology import Hierarchical


@register_algorithm("bytegrad")
@dataclass(frozen=True)
class ByteGrad(Algorithm):
    """Every rank gets the mean of all ranks' gradients, sent as codes of about one byte an element.

    g <- Q(1/n sum_r Q(g_r))

    Q codes blocks of 512 elements of one parameter, each with its own scale (`int8`: scale = absmax/127, round half to even).
    A rank owns 1/n of the blocks: it receives their codes from all (all_to_all), sums them in rank order in float32, divides,
    encodes once more, and sends the result to all (all_gather). All ranks end bit-identical.

    With error feedback both Q code their value plus what they lost of the ones before, and keep what they lose now. What is kept
    belongs to what a step has used: several synchronised backwards in a step, skipped steps, optimizers that take turns and
    parameters that are not used lose nothing (docs/design/0014-error-feedback.md).

    Source: ByteGrad of Bagua (Gan et al. 2021, arXiv:2107.01499). Differs in the grid: Bagua has one minimum and maximum for
    1/n of a bucket (`minmax_uint8` keeps its formula, by block); and results do not depend on DDP's buckets.

    Cost a step for each rank: about 2 (n-1)/n bytes an element, against 8 (n-1)/n for float32 (int4: 1.06, sign: 0.27); two
    messages to every other rank a bucket, one if there are two ranks; memory for the gradients' code, twice, and with error
    feedback 8 (1 + 1/n) bytes an element (16 for two ranks). On a single process it does nothing.

    Fails when: an element is NaN or Inf; then its block is NaN on all ranks, which a gradient scaler sees everywhere alike.
    Elements smaller than 1/254 of the largest in their block become zero. `sign` on raw gradients learns worse than without
    compression, error feedback or not: it is meant for `qadam`'s momentum.

    Args:
        codec: Codec of what travels: "int8", "minmax_uint8", "int4", "sign", "fp16", "bf16" or "none".
        error_feedback: Whether what codes lose is kept and sent later; None: for int4 and sign.
        hierarchical: Whether ranks of a node combine what they have first, uncompressed, so that less travels between nodes:
            True, False, or "auto": when there are several nodes with equally many ranks, more than one, on each.
        average: Whether ranks get the mean; False leaves the sum.
        shared_memory: Whether GPUs of one node that can read each other's memory use one kernel over it in the place of messages;
            the bits are the same. Experimental: no GPU has run it yet.

    Example:
        >>> ByteGrad().codec
        'int8'
    """

    codec: str = "int8"
    error_feedback: bool | None = None
    hierarchical: Hierarchical = "auto"
    average: bool = True
    shared_memory: bool = False

    def __post_init__(self) -> None:
        check_codec(self.codec)
        uses_feedback(self.codec, self.error_feedback)
        check_hierarchical(self.hierarchical)
        check_average(self.average)

    def bind(self, context: Context) -> BoundAlgorithm:
        """Makes the flat or the hierarchical form, as the nodes allow. Collective."""
        if self.codec == "sign" and context.communicator.rank == 0:
            warnings.warn(
                "bytegrad with codec 'sign' learns worse than without compression; algorithm 'qadam' is what it is meant for",
                stacklevel=2,
            )
        return _ByteGrad(context, self)


class _ByteGrad(BoundAlgorithm):
    def __init__(self, context: Context, options: ByteGrad) -> None:
        super().__init__(context)
        hierarchical = context.communicator.topology.use_hierarchy(options.hierarchical)
        error_feedback = uses_feedback(options.codec, options.error_feedback)
        self.reducer = BucketReducer(
            context,
            options.codec,
            hierarchical=hierarchical,
            error_feedback=error_feedback,
            shared_memory=options.shared_memory,
        )
        self._divisor = context.communicator.world_size if options.average else 1

    def reduce_gradients(self, bucket: GradBucket, label: str) -> torch.futures.Future[torch.Tensor]:
        if self.communicator.world_size == 1:
            return super().reduce_gradients(bucket, label)
        return self.reducer.all_reduce(bucket, label, self._divisor)

    def after_backward(self) -> None:
        self.reducer.after_backward()

    def after_step(self, optimizer: torch.optim.Optimizer) -> None:
        self.reducer.after_step(optimizer)

    @property
    def rank_state_layout(self) -> str:  # type: ignore[override]
        return self.reducer.pipeline.residual_layout

    def rank_state_dict(self) -> dict[str, Any]:
        return self.reducer.state_dict()

    def load_rank_state_dict(self, state: dict[str, Any]) -> None:
        self.reducer.load_state_dict(state)

    def reset_rank_state(self) -> None:
        self.reducer.reset_state()

    def teardown(self) -> None:
        self.reducer.close()
