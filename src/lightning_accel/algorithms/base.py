"""The contract of an algorithm: options that a user chooses, and what is bound to one replica.

Options are a frozen dataclass, validated by its constructor, picklable, without rank or device: `ByteGrad(codec="int8")`.
Binding them to a replica gives a `BoundAlgorithm`, whose methods are the hooks of a training step. A user's own algorithm is
two such classes and `@register_algorithm("name")`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from lightning_accel.background.communicator import Communicator
from lightning_accel.transport.topology import Topology

if TYPE_CHECKING:
    from torch._C._distributed_c10d import GradBucket as GradBucket
    from torch.nn.parallel import DistributedDataParallel
else:
    from torch.distributed import GradBucket  # DDP compares a hook's annotation with this very class


@dataclass(frozen=True)
class Parameters:
    """A replica's trainable and frozen parameters in the order of `named_parameters`, tied ones once.

    Attributes:
        names: Names of the parameters.
        tensors: The parameters themselves.
    """

    names: tuple[str, ...]
    tensors: tuple[torch.nn.Parameter, ...]

    @classmethod
    def of(cls, module: torch.nn.Module) -> Parameters:
        """Lists the parameters of a module."""
        named = list(module.named_parameters())
        return cls(tuple(name for name, _ in named), tuple(parameter for _, parameter in named))


@dataclass(frozen=True)
class Context:
    """What an algorithm is bound to.

    Attributes:
        ddp: DDP instance, with its parameters, buckets and flags.
        parameters: Parameters of the wrapped module.
        communicator: Communicator for everything that is sent.
    """

    ddp: DistributedDataParallel
    parameters: Parameters
    communicator: Communicator


class Algorithm(ABC):
    """Options of an algorithm. Subclasses are frozen dataclasses with a default for each option."""

    name: ClassVar[str]
    """Name of the algorithm, set by `register_algorithm`."""

    keeps_gradients: ClassVar[bool] = True
    """Whether `.grad` holds gradients when the optimizer steps. If not, it must be neither clipped nor scaled."""

    unused_parameters_argument: ClassVar[str] = "find_unused_parameters"
    """DistributedDataParallel's argument that lets a backward leave parameters out, when it is True."""

    @abstractmethod
    def bind(self, context: Context) -> BoundAlgorithm:
        """Makes the part that communicates. Collective: all ranks call it in the same order."""

    def needs_kernels(self, topology: Topology) -> bool:
        """Whether native kernels compute on the tensors' device; else an install without kernels for it serves too."""
        return True


class BoundAlgorithm:
    """An algorithm at work on one replica, which calls its hooks. A hook does nothing unless it is overridden.

    A *round* is what leads to one optimizer step: one or more micro-batches, then the step.
    """

    lets_ddp_divide = False
    """Whether DDP divides gradients by the number of ranks as it fills buckets, which saves a pass over memory. Then
    `all_reduce` gets the buckets instead of `reduce_gradients`."""

    ranks_differ = False
    """Whether weights, and with them optimizers and gradient scalers, differ between ranks. Then a checkpoint keeps those of
    each rank."""

    rank_state_layout = "any nodes"
    """Which nodes `rank_state_dict` belongs to, or what else it depends on besides rank and number of ranks: words that are
    equal on all ranks. A state of another layout is not restored."""

    averages: Sequence[torch.nn.Module] = ()
    """Modules that hold averages of the weights over time (EMA). `consensus` makes them equal on all ranks too."""

    relays_termination = False
    """Whether the algorithm's messages tell all ranks that one of them is to end (SIGTERM). Then ranks need not wait for each
    other at each batch to learn of it; see docs/design/0006-sigterm.md."""

    is_in_lockstep = True
    """Whether ranks wait for each other in this round; used if `relays_termination`."""

    is_terminating = False
    """Whether all ranks know that one of them is to end; the same on all ranks after `pause` and `consensus`."""

    def __init__(self, context: Context) -> None:
        self.context = context
        self.communicator = context.communicator

    def reduce_gradients(self, bucket: GradBucket, label: str) -> torch.futures.Future[torch.Tensor]:
        """Starts to reduce a bucket that backward has filled; the future delivers what becomes the gradient.

        Called during backward, in the same order on all ranks; must not wait. By default the local gradient stays.
        """
        future: torch.futures.Future[torch.Tensor] = torch.futures.Future()
        future.set_result(bucket.buffer())
        return future

    def all_reduce(self, divided: torch.Tensor, label: str) -> torch.futures.Future[torch.Tensor]:
        """Starts to sum the content of a bucket that DDP has divided; replaces `reduce_gradients` if `lets_ddp_divide`."""
        raise NotImplementedError

    def before_forward(self) -> None:
        """Runs before the first forward of a round."""

    def attach_optimizers(self, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        """Receives the optimizers of the replica's parameters, before the first forward."""

    def after_backward(self) -> None:
        """Runs at the end of a backward that has handed over buckets, when `.grad` holds what they were reduced to.

        Not where DDP hands them over after the backward, as it does once with a static graph under manual optimisation.
        """

    def before_step(self) -> None:
        """Runs after the round's last backward, before gradients are unscaled or clipped and the optimizer steps."""

    def after_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Runs after an optimizer has stepped; not when a gradient scaler skips the step, on this rank only perhaps."""

    def consensus(self) -> None:
        """Makes all ranks' weights equal, before validation, test, predict, checkpoint and the end of fit. Collective."""

    def consensus_if_terminating(self) -> bool:
        """Reaches a consensus if a rank is to end; else leaves weights as they are, for they may be in use. Collective.

        Called if `relays_termination`, before a collective that is not the algorithm's own: there ranks would wait in vain for
        one that has gone to a consensus to end.

        Returns:
            Whether a rank is to end, the same on all ranks; False where ranks are in step anyway.
        """
        return False

    def pause(self) -> None:
        """Stops communication that runs by itself. Collective and idempotent."""

    def resume(self) -> None:
        """Restarts what `pause` stopped. Collective and idempotent."""

    def request_termination(self) -> None:
        """Tells all ranks that this one is to end, if `relays_termination`. Called by a signal handler; must not wait."""

    def state_dict(self) -> dict[str, Any]:
        """Returns what a resumed run needs and all ranks hold alike, as tensors, numbers, strings, lists and dicts."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what `state_dict` returned. The weights are the checkpoint's by then; what follows from them starts anew."""

    def rank_state_dict(self) -> dict[str, Any]:
        """Returns what a resumed run needs and each rank holds for itself, of the same types; empty on all ranks or on none.

        Called after `consensus`; not collective. Tensors may be the algorithm's own: they are written before it goes on.
        """
        return {}

    def load_rank_state_dict(self, state: dict[str, Any]) -> None:
        """Restores what `rank_state_dict` returned on this rank, of as many ranks and the same `rank_state_layout`.

        Called after `load_state_dict`.
        """

    def reset_rank_state(self) -> None:
        """Starts anew what `rank_state_dict` returns: a checkpoint was loaded that has nothing of the kind for this rank."""

    def teardown(self) -> None:
        """Ends what was started. Called after an exception too."""
