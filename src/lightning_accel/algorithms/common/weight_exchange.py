"""Base of the algorithms that exchange weights, not gradients: flat buffers, rounds and consensus."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from lightning_accel.algorithms.base import BoundAlgorithm, Context
from lightning_accel.algorithms.common.consensus import Consensus
from lightning_accel.algorithms.common.flat_weights import FlatWeights
from lightning_accel.background.comm_queue import Step
from lightning_accel.collectives import weight_means
from lightning_accel.native import DTYPES
from lightning_accel.transport.group import Group
from lightning_accel.transport.scratch import Scratch
from lightning_accel.transport.topology import Hierarchical


class WeightExchange(BoundAlgorithm):
    """Exchanges weights between ranks, and keeps gradients local. Making it is collective.

    Weights change in `before_forward`, `before_step` and `consensus` alone, never inside a backward. DDP does not broadcast
    buffers such as BatchNorm's statistics in each forward: they differ between ranks until the next consensus.

    Args:
        context: Replica to bind to.
        hierarchical: Whether ranks of a node take their mean first, and exchange its shares between nodes.
        widen: Whether float16 and bfloat16 weights are exchanged as float32.

    Raises:
        ValueError: If weights cannot be sent, or ranks hold different ones; on all ranks alike, before any is sent.
    """

    ranks_differ = True

    def __init__(self, context: Context, hierarchical: Hierarchical, *, widen: bool = False) -> None:
        super().__init__(context)
        ddp, communicator = context.ddp, self.communicator
        named = zip(context.parameters.names, context.parameters.tensors, strict=True)
        own = {name: p for name, p in named if name not in ddp.parameters_to_ignore}
        trainable = {name: p for name, p in own.items() if p.requires_grad}
        for name, tensor in trainable.items():
            if tensor.dtype not in DTYPES:
                raise ValueError(f"weights must be {', '.join(str(d) for d in DTYPES)}: parameter {name!r} is {tensor.dtype}")
        if communicator.topology.use_hierarchy(hierarchical):
            self._queue = communicator.open_queue("nodes")
            self.intra_node, self.inter_node = self._queue.intra_node, self._queue.inter_node
        else:
            self._queue = communicator.open_queue("all")
            self.intra_node, self.inter_node = Group(None), self._queue.group
        self._consensus = Consensus(context, self._queue, self.intra_node, self.inter_node, trainable)
        self.rounds = 0
        """Number of rounds finished so far."""
        self.weights = FlatWeights(list(trainable.values()), widen=widen)
        # Each rank of a node has a share of a buffer, and each node a share of that.
        self.buffers = self.weights.allocate(multiple=communicator.world_size)
        self._trainable = list(trainable.values())
        self._exchanged: list[torch.futures.Future[torch.Tensor]] = []
        ddp.broadcast_buffers = False

    def exchange(self, buffer: int, share: torch.Tensor, scratch: Scratch) -> None:
        """Exchanges this rank's share of a buffer with `inter_node`, and overwrites it. Runs in the background."""
        raise NotImplementedError

    def attach_optimizers(self, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        """Refuses LBFGS."""
        for optimizer in optimizers:
            if isinstance(optimizer, torch.optim.LBFGS):
                raise ValueError(
                    f"{self.communicator.name} exchanges weights once a step, and LBFGS tries several weights in one: take "
                    "another optimizer, or gradient_allreduce"
                )

    def before_step(self) -> None:
        """Counts a round."""
        self.rounds += 1
        self.communicator.count_full_precision(self._trainable)

    def start_exchange(self) -> None:
        """Copies the weights to the buffers and starts to exchange them; does nothing on a single process."""
        if self.communicator.world_size == 1:
            return
        self.weights.gather(self.buffers)

        def procedure(index: int, buffer: torch.Tensor) -> Callable[[], None]:
            def exchange(share: torch.Tensor) -> None:
                if self.inter_node.world_size > 1:
                    self.exchange(index, share, self._queue.scratch)

            return lambda: weight_means.mean(buffer, self.intra_node, self._queue.scratch, exchange)

        label = f"exchange of round {self.rounds}"
        self._exchanged = [self._submit(label, buffer, procedure(i, buffer)) for i, buffer in enumerate(self.buffers)]

    def finish_exchange(self) -> None:
        """Waits for an exchange that was started, and copies the weights from the buffers; does nothing if none was."""
        if self._exchanged:
            self._wait()
            self.weights.scatter(self.buffers)

    def consensus(self) -> None:
        """Gives all ranks one model, see `Consensus`. Waits for an exchange in flight and drops it. Gradients stay."""
        if self.communicator.world_size == 1:
            return
        self._wait()
        self._consensus.reach(self.weights, self.buffers, self.averages)

    def state_dict(self) -> dict[str, Any]:
        """Returns the counter; weights are saved with the model, and are equal on all ranks then."""
        return {"rounds": self.rounds}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores the counter."""
        self.rounds = int(state["rounds"])

    def _submit(self, label: str, buffer: torch.Tensor, procedure: Callable[[], None]) -> torch.futures.Future[torch.Tensor]:
        return self.communicator.submit(label, buffer, Step("exchange", self._queue, procedure), is_gradient=False)

    def _wait(self) -> None:
        """Waits for what was started, and lets a GPU's current stream wait for it too."""
        exchanged, self._exchanged = self._exchanged, []
        if exchanged:
            self.communicator.wait()
        for future in exchanged:
            future.wait()
