"""Which residual a message starts from, and what becomes of the one that it leaves."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch

from lightning_accel.algorithms.common.gradient_watch import GradientWatch
from lightning_accel.compression.error_feedback import ErrorFeedback


class ResidualKeeper:
    """Follows each parameter's messages, so that what optimizers use and what is left over add up to the gradients.

    A message carries x + e, delivers G, and leaves e' = x + e - G, summed over all quantisations. DDP fills buckets with `.grad`
    as it is after backward has added to it. So the second message of a step carries the first one's G and the new gradient, and
    its result replaces G; results do not add up. What a message starts from therefore depends on what has become of the last one:

    - used by a step: e is what the last message left, from then on for good (`commit`);
    - still in `.grad` as backward adds to it (several synchronised backwards in a step): x contains its G, and e is what it left;
    - gone, because `.grad` was zeroed and no step had used it (a skipped step, an optimizer that did not step): it was sent in
      vain, and e is the committed residual, as if it had never been sent;
    - never written to `.grad`, as DDP does with a parameter that no rank has used: sent in vain too.

    Args:
        feedback: The residuals.
        parameters: Parameters of the model, in the order of its places.
        watch: Watches their gradients.
        gradients_are_views: Whether `.grad` lies in DDP's buckets, so that every result is in it.
    """

    def __init__(
        self, feedback: ErrorFeedback, parameters: Sequence[torch.Tensor], watch: GradientWatch, *, gradients_are_views: bool
    ) -> None:
        self._feedback = feedback
        self._parameters = parameters
        self._places = {id(parameter): place for place, parameter in enumerate(parameters)}
        self._trainable = {place for place, parameter in enumerate(parameters) if parameter.requires_grad}
        self._watch = watch
        self._gradients_are_views = gradients_are_views
        self._unsettled: set[int] = set()
        """Places of parameters whose last message's result no step has used; their pending residuals are that message's."""
        self._unconfirmed: dict[int, tuple[int, list[torch.Tensor] | None]] = {}
        """For parameters that this rank's backward did not use: `.grad`'s version, and pending residuals before the message."""
        watch.listen(self._unsettled, self._look)

    def before_message(self, places: Collection[int]) -> bool:
        """Chooses what the messages of a bucket start from, and returns whether that is pending residuals.

        Args:
            places: The bucket's parameters.
        """
        not_added = [place for place in places if not self._watch.has_added(place)]
        for place in self._unsettled.intersection(not_added):
            self._look(place)
        continued = self._unsettled.intersection(places)
        if continued:
            self._feedback.reset([place for place in places if place not in continued])
        if not self._gradients_are_views:
            for place in not_added:
                if (gradient := self._parameters[place].grad) is not None:
                    before = self._feedback.pending(place) if place in continued else None
                    self._unconfirmed[place] = gradient._version, before
        self._unsettled.update(places)
        return bool(continued)

    def after_backward(self) -> None:
        """Takes back messages whose results DDP has not written to `.grad`. Idempotent; called as soon as `.grad` is written."""
        for place, (version, before) in self._unconfirmed.items():
            gradient = self._parameters[place].grad
            if gradient is not None and gradient._version == version:
                if before is None:
                    self._unsettled.discard(place)
                else:
                    self._feedback.restore_pending(place, before)
        self._unconfirmed.clear()

    def commit(self, optimizer: torch.optim.Optimizer) -> None:
        """Commits the residuals that belong to what an optimizer's step has used."""
        self.after_backward()
        parameters = (parameter for group in optimizer.param_groups for parameter in group["params"])
        with_gradient = {self._places.get(id(parameter)) for parameter in parameters if parameter.grad is not None}
        used = self._unsettled & with_gradient
        if used:
            self._feedback.commit(None if used == self._trainable else sorted(used))
            self._unsettled -= used

    def forget(self) -> None:
        """Forgets all messages, because residuals were loaded."""
        self._unsettled.clear()
        self._unconfirmed.clear()

    def _look(self, place: int) -> None:
        """Looks whether the last message's result, which no step has used, is still in `.grad`."""
        gradient = self._parameters[place].grad
        if gradient is None:
            self._unsettled.discard(place)
        else:
            self._feedback.reset([place], unless=gradient.any())  # on a GPU without waiting
