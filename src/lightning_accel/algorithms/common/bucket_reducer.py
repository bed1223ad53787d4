"""From DDP's buckets to the pipeline: what all algorithms share that all_reduce gradients by our own collectives."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from itertools import accumulate
from typing import Any

import torch

from lightning_accel.algorithms.base import Context, GradBucket
from lightning_accel.algorithms.common.gradient_watch import GradientWatch
from lightning_accel.algorithms.common.residual_keeper import ResidualKeeper
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
        self._places = {id(parameter): place for place, parameter in enumerate(parameters)}
        self._parameters = parameters
        self._gradients_are_views: bool = context.ddp.gradient_as_bucket_view
        self._numels = [parameter.numel() for parameter in parameters]
        device = parameters[0].device
        self.pipeline = Pipeline(context.communicator, self._numels, device, codec, hierarchical=hierarchical)
        self._planned: dict[tuple[torch.dtype, tuple[int, ...], bool], PlannedTensor] = {}
        self._keeper: ResidualKeeper | None = None
        if shared_memory:
            trainable = [place for place, parameter in enumerate(parameters) if parameter.requires_grad]
            dtypes = sorted({parameters[place].dtype for place in trainable}, key=str)
            # As large as a bucket can get: DDP's first one may hold all of a dtype.
            self.pipeline.share_memory(
                [(dtype, tuple((place, 0) for place in trainable if parameters[place].dtype == dtype)) for dtype in dtypes]
            )
        if error_feedback:
            self.keep_residuals()

    @cached_property
    def watch(self) -> GradientWatch:
        """Watch on the parameters' gradients, which is there from the first use on; every backward pays for it."""
        return GradientWatch(self._parameters)

    def places_of(self, bucket: GradBucket) -> tuple[int, ...]:
        """Returns the places of a bucket's parameters among all."""
        return tuple(self._places[id(parameter)] for parameter in bucket.parameters())

    def keep_residuals(self) -> None:
        """Turns error feedback on, where anything is quantised. Called before the first backward."""
        self.pipeline.keep_residuals()
        feedback = self.pipeline.feedback
        if feedback is not None and self._keeper is None:
            are_views = self._gradients_are_views
            self._keeper = ResidualKeeper(feedback, self._parameters, self.watch, gradients_are_views=are_views)

    def all_reduce(
        self,
        bucket: GradBucket,
        label: str,
        divisor: int,
        before: Callable[[], None] | None = None,
        *,
        is_exact: bool = False,
    ) -> torch.futures.Future[torch.Tensor]:
        """Submits a bucket's all_reduce; the future delivers the sum divided by `divisor`, in the bucket's own buffer.

        Args:
            bucket: A bucket that backward has filled.
            label: What this is, for messages.
            divisor: Number of ranks for a mean, 1 for a sum.
            before: Changes the bucket first, where the all_reduce runs.
            is_exact: Whether it is uncompressed, whatever the codec.
        """
        gradients = bucket.buffer()
        if gradients.layout != torch.strided:
            raise TypeError(f"only dense gradients can be coded, got {gradients.layout}: use sparse=False in embeddings")
        places = self.places_of(bucket)
        planned = self._planned.get((gradients.dtype, places, is_exact))
        if planned is None:
            if bucket.index() == 0:  # DDP has rebuilt its buckets; at a backward's first one nothing is pending
                self.pipeline.forget()
                self._planned.clear()
            starts = accumulate((self._numels[place] for place in places), initial=0)
            planned = self.pipeline.plan(gradients.dtype, tuple(zip(places, starts, strict=False)), is_exact=is_exact)
            self._planned[gradients.dtype, places, is_exact] = planned
        from_pending = False
        if self._keeper is not None and not is_exact:
            from_pending = self._keeper.before_message(places)
            self.watch.note_message(places)
        return self.pipeline.all_reduce(label, gradients, planned, divisor, before, from_pending=from_pending)

    def after_backward(self) -> None:
        """Takes note that `.grad` holds the results. Called at the end of each backward that has handed over buckets."""
        if self._keeper is not None:
            self._keeper.after_backward()

    def after_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Takes note that an optimizer has used gradients: residuals that belong to them count from now on."""
        if self._keeper is not None:
            self._keeper.commit(optimizer)

    def state_dict(self) -> dict[str, Any]:
        """Returns this rank's residuals, if there are any."""
        return self.pipeline.feedback.state_dict() if self.pipeline.feedback is not None else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what `state_dict` returned on this rank.

        Raises:
            ValueError: For the state of another model, number of ranks or hierarchy.
        """
        if self.pipeline.feedback is not None and self._keeper is not None and state:
            self.pipeline.feedback.load_state_dict(state)
            self._keeper.forget()

    def reset_state(self) -> None:
        """Drops what the residuals hold."""
        if self.pipeline.feedback is not None and self._keeper is not None:
            self.pipeline.feedback.drop()
            self._keeper.forget()

    def close(self) -> None:
        """Stops watching gradients. Idempotent."""
        if "watch" in self.__dict__:
            self.watch.close()
