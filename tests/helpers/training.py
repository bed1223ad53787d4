"""One rank's part of a training run, and the names of the nodes that ranks are told to be on."""

import contextlib
from collections.abc import Callable, Iterable, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from helpers.tensors import assert_same_bits
from lightning_accel import Algorithm, Replica

TIMEOUT = timedelta(seconds=30)
"""Of a collective, where nothing should come near it."""


def node_of(rank: int, nodes: Sequence[Sequence[int]] | None) -> str:
    """The name of the node that a rank is on.

    Args:
        rank: the rank.
        nodes: the ranks of each node; None puts all ranks on one.
    """
    return "a" if nodes is None else next(f"node {m}" for m, node in enumerate(nodes) if rank in node)


class Training:
    """A model in DDP, an algorithm and an optimizer on this rank, in a default process group. Closes at the end of a `with`.

    Args:
        model: the model, which moves to `device`.
        algorithm: the algorithm that is attached.
        optimizer: makes the optimizer of the parameters that need a gradient; None for none.
        nodes: the ranks of each node; None puts all ranks on one.
        device: the model's device.
        timeout: of a collective.
        **ddp_options: for DDP.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        algorithm: Algorithm,
        optimizer: Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer] | None = None,
        *,
        nodes: Sequence[Sequence[int]] | None = None,
        device: str = "cpu",
        timeout: timedelta = TIMEOUT,
        **ddp_options: Any,
    ) -> None:
        self.rank = dist.get_rank()
        self.ddp = DistributedDataParallel(model.to(device), **ddp_options)
        self.optimizer = optimizer([p for p in model.parameters() if p.requires_grad]) if optimizer else None
        optimizers = [self.optimizer] if self.optimizer else []
        self.replica = Replica(self.ddp, algorithm, optimizers, timeout=timeout, node_name=node_of(self.rank, nodes))

    def __enter__(self) -> "Training":
        return self

    def __exit__(self, *error: object) -> None:
        self.replica.close()

    @property
    def model(self) -> torch.nn.Module:
        """The model itself."""
        return self.ddp.module

    def micro_batch(self, inputs: Any, *, last: bool = True) -> None:
        """Adds to the gradients; the last micro-batch of a round communicates."""
        with contextlib.nullcontext() if last else self.ddp.no_sync():
            self.ddp(inputs).backward()

    def backward(self, *micro_batches: Any) -> None:
        """Computes gradients from the start; all but the last micro-batch do not communicate."""
        (self.optimizer or self.ddp).zero_grad()
        for place, inputs in enumerate(micro_batches, start=1):
            self.micro_batch(inputs, last=place == len(micro_batches))

    def round(self, *micro_batches: Any) -> None:
        """Computes gradients and makes a step."""
        self.backward(*micro_batches)
        self.optimizer.step()

    def assert_weights(self, expected: Iterable[torch.Tensor], what: object) -> None:
        """Fails unless the weights that need a gradient have the expected bits; a tied one counts once."""
        weights = [(name, weight) for name, weight in self.model.named_parameters() if weight.requires_grad]
        for (name, weight), wanted in zip(weights, expected, strict=True):
            assert_same_bits(weight, wanted, f"rank {self.rank}, {what}, {name}")

    @property
    def scratch_bytes(self) -> int:
        """Bytes that the queues and buckets hold for what is under way."""
        reducer = getattr(self.replica.algorithm, "reducer", None)
        if reducer is not None:
            return reducer.pipeline.allocated_bytes
        return sum(queue.scratch.allocated_bytes for queue in self.replica.communicator.queues)
