"""One model, equal on all ranks: the mean of what ranks train, and of everything else that differs between them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch.nn.parameter import is_lazy

from lightning_accel.algorithms.base import Context
from lightning_accel.algorithms.common.flat_weights import FlatWeights
from lightning_accel.background.comm_queue import CommQueue, Step
from lightning_accel.collectives import comparison, weight_means
from lightning_accel.native import DTYPES
from lightning_accel.transport.group import Group


class Consensus:
    """Gives all ranks the same parameters and buffers, to the bit. Making it is collective.

    What ranks exchange is averaged. Of everything else, frozen parameters that are updated by hand (a teacher) and buffers, ranks
    compare digests first, and send what differs: floating and complex tensors are averaged, others are copied from rank 0.
    What DDP is told to ignore is left alone, and so are tensors without contents (on the meta device, or lazy ones).

    Args:
        context: Replica whose model this is.
        queue: Queue in which messages are sent.
        intra_node: Group of this node's ranks, or of this one alone.
        inter_node: Group of this rank's peers: one a node, or all.
        exchanged: Parameters that ranks exchange, by name.

    Raises:
        ValueError: If parameters or buffers are not alike on all ranks, with the name of one; on all ranks alike.
    """

    def __init__(
        self,
        context: Context,
        queue: CommQueue,
        intra_node: Group,
        inter_node: Group,
        exchanged: dict[str, torch.nn.Parameter],
    ) -> None:
        self._context, self._communicator = context, context.communicator
        self._queue, self._intra_node, self._inter_node = queue, intra_node, inter_node
        self._device = next((weight.device for weight in exchanged.values()), torch.device("cpu"))
        self._exchanged = {id(weight) for weight in exchanged.values()}
        self._wrapped = {_parameter(name): _describe_exchanged(weight) for name, weight in exchanged.items()}
        if self._communicator.world_size > 1:
            self._compare(())

    @torch.inference_mode(False)  # Lightning's validation begins inside of it, and the queue's thread would get such tensors
    def reach(self, weights: FlatWeights, buffers: Sequence[torch.Tensor], averages: Sequence[torch.nn.Module]) -> None:
        """Makes everything equal. Collective.

        Args:
            weights: Parameters that ranks exchange.
            buffers: Buffers of `weights`, free to be overwritten.
            averages: Modules beside the model, such as averages of weights over time.

        Raises:
            ValueError: If ranks hold different tensors, or some that cannot be sent; on all ranks, and before any is changed.
            CommunicationError: If communication has failed.
        """
        different = comparison.differing(self._compare(averages), self._gather).values()
        means = FlatWeights([tensor for tensor in different if _has_mean(tensor)], device=self._device)
        copies = FlatWeights([tensor for tensor in different if not _has_mean(tensor)], device=self._device)
        made = [
            (weights, buffers, self._mean),
            (means, means.allocate(multiple=self._communicator.world_size), self._mean),
            (copies, copies.allocate(), self._copy),
        ]
        work = []
        for flat, targets, procedure in made:
            flat.gather(targets)
            work += [(target, partial(procedure, target)) for target in targets]
        self._send(work)
        with torch.inference_mode():  # what a validation has made may be overwritten in this mode only
            for flat, targets, _ in made:
                flat.scatter(targets)
        self._queue.scratch.clear()  # a mean needs more of it than messages do

    def _compare(self, averages: Sequence[torch.nn.Module]) -> dict[str, torch.Tensor]:
        """Returns what is not exchanged, by name, once it is known that all ranks hold such tensors. Collective."""
        module, ignored = self._context.ddp.module, self._context.ddp.parameters_to_ignore
        tensors = {_parameter(name): weight for name, weight in module.named_parameters() if name not in ignored}
        tensors |= {f"buffer {name!r}": buffer for name, buffer in module.named_buffers() if name not in ignored}
        for place, average in enumerate(averages):
            held = (*average.named_parameters(), *average.named_buffers())
            tensors |= {f"{name!r} of average {place}": tensor for name, tensor in held}
        layout = {name: comparison.describe(tensor) for name, tensor in tensors.items()}
        exchanged = {name: tensor for name, tensor in tensors.items() if id(tensor) in self._exchanged}
        layout |= {name: _describe_exchanged(weight) for name, weight in exchanged.items()}
        comparison.check_layouts(layout, self._gather, self._communicator.name)
        for name, wrapped in self._wrapped.items():
            if (now := layout.get(name, wrapped)) != wrapped:
                raise ValueError(
                    f"{self._communicator.name}: {name} was {wrapped} when the model was wrapped, and is {now} now: unwrap the "
                    "model, change it, and wrap it anew"
                )
        tensors = {name: t for name, t in tensors.items() if name not in exchanged and not t.is_meta and not is_lazy(t)}
        for name in tensors:
            if not comparison.is_dense(tensors[name]):
                raise ValueError(
                    f"{self._communicator.name}: {name} is {layout[name]}, which cannot be compared between ranks: keep it in an "
                    f"attribute that is no buffer, or {comparison.IGNORE}"
                )
        return tensors

    def _gather(self, message: bytes) -> list[bytes]:
        ranked = self._communicator.rank.to_bytes(4, "little") + message  # groups order ranks in their own ways
        sent = torch.tensor(list(ranked), dtype=torch.uint8, device=self._device)
        world_size = self._inter_node.world_size * self._intra_node.world_size
        gathered = torch.empty(world_size, len(ranked), dtype=torch.uint8, device=self._device)

        def procedure() -> None:
            of_node = gathered.view(self._inter_node.world_size, -1)[self._inter_node.rank]
            self._intra_node.all_gather(of_node, sent, self._queue.scratch)()
            self._inter_node.all_gather(gathered.view(-1), of_node, self._queue.scratch)()

        self._send([(gathered, procedure)])
        messages = [bytes(row) for row in gathered.tolist()]
        return [row[4:] for row in sorted(messages, key=lambda row: int.from_bytes(row[:4], "little"))]

    def _mean(self, buffer: torch.Tensor) -> None:
        scratch, inter_node = self._queue.scratch, self._inter_node
        numbers = torch.view_as_real(buffer).view(-1) if buffer.is_complex() else buffer
        weight_means.mean(numbers, self._intra_node, scratch, lambda share: weight_means.mean(share, inter_node, scratch))

    def _copy(self, buffer: torch.Tensor) -> None:
        for group in (self._inter_node, self._intra_node):
            group.broadcast(buffer.view(torch.uint8))

    def _send(self, work: Sequence[tuple[torch.Tensor, Callable[[], None]]]) -> None:
        """Runs procedures that overwrite tensors, and waits for them; a GPU's current stream waits too."""
        submit, queue = self._communicator.submit, self._queue
        futures = [submit("consensus", tensor, Step("exchange", queue, run), is_gradient=False) for tensor, run in work]
        self._communicator.wait()
        for future in futures:
            future.wait()


def _parameter(name: str) -> str:
    return f"parameter {name!r}"


def _describe_exchanged(parameter: torch.Tensor) -> str:
    return f"{comparison.describe(parameter)}, exchanged"


def _has_mean(tensor: torch.Tensor) -> bool:
    return tensor.dtype in DTYPES or tensor.is_complex()
