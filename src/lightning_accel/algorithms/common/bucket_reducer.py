"""From DDP's buckets to the pipeline: what all algorithms share that all_reduce gradients by our own collectives."""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate

import torch

from lightning_accel.algorithms.base import Context, GradBucket
from lightning_accel.background.pipeline import Pipeline, PlannedTensor
from lightning_accel.native import DTYPES


class BucketReducer:
    """All_reduces DDP's buckets along messages that the parameters in a bucket decide.

    DDP rebuilds its buckets after the first backward, and their index and address say nothing; the parameters in a bucket do.

    Making it is collective.

    Args:
        context: The replica.
        codec: Codec of the messages between ranks, or between nodes.
        hierarchical: Whether ranks of a node sum first, uncompressed.
        error_feedback: Whether what codes lose is kept and sent later.
        shared_memory: Whether GPUs of a node that share memory use it in the place of messages.

    Attributes:
        pipeline: Sends the messages, and holds the residuals.

    Raises:
        ValueError: For parameters whose gradients cannot be sent.
    """

    def __init__(
        self, context: Context, codec: str, *, hierarchical: bool, error_feedback: bool = False, shared_memory: bool = False
    ) -> None:
        names, parameters = context.parameters.names, context.parameters.tensors
        for name, parameter in zip(names, parameters, strict=True):
            if parameter.requires_grad and parameter.dtype not in DTYPES:
                raise ValueError(
                    f"gradients must be {', '.join(str(dtype) for dtype in DTYPES)}: parameter {name!r} is {parameter.dtype}"
                )
        self._parameters = parameters
        self._numels = [parameter.numel() for parameter in parameters]
        self._index = {id(parameter): place for place, parameter in enumerate(parameters)}
        device = parameters[0].device
        self.pipeline = Pipeline(context.communicator, self._numels, device, codec, hierarchical=hierarchical)
        self._planned: dict[tuple[torch.dtype, tuple[int, ...]], PlannedTensor] = {}
        if shared_memory:
            trainable = [place for place, parameter in enumerate(parameters) if parameter.requires_grad]
            dtypes = sorted({parameters[place].dtype for place in trainable}, key=str)
            # As large as a bucket can get: DDP's first one may hold all of a dtype.
            self.pipeline.share_memory(
                [(dtype, tuple((place, 0) for place in trainable if parameters[place].dtype == dtype)) for dtype in dtypes]
            )
        if error_feedback:
            self.pipeline.keep_residuals()

    def all_reduce(
        self, bucket: GradBucket, label: str, divisor: int, before: Callable[[], None] | None = None
    ) -> torch.futures.Future[torch.Tensor]:
        """Submits a bucket's all_reduce; the future delivers the sum divided by `divisor`, in the bucket's own buffer.

        Args:
            bucket: A bucket that backward has filled.
            label: What this is, for messages.
            divisor: Number of ranks for a mean, 1 for a sum.
            before: Changes the bucket first, where the all_reduce runs.
        """
        gradients = bucket.buffer()
        if gradients.layout != torch.strided:
            raise TypeError(f"only dense gradients can be coded, got {gradients.layout}: use sparse=False in embeddings")
        parameters = tuple(self._index[id(parameter)] for parameter in bucket.parameters())
        planned = self._planned.get((gradients.dtype, parameters))
        if planned is None:
            if bucket.index() == 0:  # DDP has rebuilt its buckets; at a backward's first one nothing is pending
                self.pipeline.forget()
                self._planned.clear()
            starts = accumulate((self._numels[place] for place in parameters), initial=0)
            planned = self.pipeline.plan(gradients.dtype, tuple(zip(parameters, starts, strict=False)))
            self._planned[gradients.dtype, parameters] = planned
        return self.pipeline.all_reduce(label, gradients, planned, divisor, before)

    def commit(self, optimizer: torch.optim.Optimizer) -> None:
        """Keeps the residuals of the last backward, of the parameters whose gradients this optimizer has used.

        Those of others, which step by another optimizer or were not used in this round, keep what their last step left: the
        code of this backward reaches nobody.
        """
        stepped = {id(p) for group in optimizer.param_groups for p in group["params"] if p.grad is not None}
        if stepped >= {id(p) for p in self._parameters if p.requires_grad}:
            self.pipeline.commit()
        else:
            self.pipeline.commit(sorted(self._index[one] for one in stepped & self._index.keys()))
