"""All_reduces of tensors that hold parameters, in the background: from (tensor, places) to steps in queues."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from lightning_accel.background.comm_queue import CommQueue, Step
from lightning_accel.background.communicator import Communicator
from lightning_accel.collectives.hierarchical import HierarchicalPlan, hierarchical_all_reduce_steps
from lightning_accel.collectives.message_plan import Sums, TwoShotPlan, pieces_of
from lightning_accel.collectives.sharded import Steps
from lightning_accel.collectives.shared_memory import PeerMemory, open_peer_memory
from lightning_accel.collectives.two_shot import compressed_all_reduce_steps
from lightning_accel.compression.block_layout import Layout
from lightning_accel.compression.error_feedback import ErrorFeedback, ResidualPlace
from lightning_accel.transport.scratch import Scratch

Places = tuple[tuple[int, int], ...]
"""What a tensor holds: pairs of a parameter's place in the layout and its first element in the tensor."""


@dataclass(frozen=True)
class PlannedTensor:
    """What is known of tensors that hold the same parameters; made by `Pipeline.plan`.

    Attributes:
        plan: Their messages.
        kept: Memory for what is under way; tensors overtake one another, so each has its own.
        is_exact: Whether the messages are uncompressed, whatever the pipeline's codec, and have no residuals.
    """

    plan: TwoShotPlan | HierarchicalPlan
    kept: Scratch
    is_exact: bool


class Pipeline:
    """Plans messages for tensors, and all_reduces along them.

    An all_reduce is cut where it waits. Its parts run in queues of their own, so that several tensors are under way: one is
    encoded while the sum of another is waited for.

    Making it is collective.

    Args:
        communicator: Runs the steps.
        numels: Elements of each parameter, the same on all ranks.
        device: Device of the tensors.
        codec: Codec of the messages between ranks, or between nodes.
        hierarchical: Whether ranks of a node sum first, uncompressed.

    Attributes:
        feedback: What codes have lost; None without error feedback.
    """

    def __init__(
        self, communicator: Communicator, numels: Sequence[int], device: torch.device, codec: str, *, hierarchical: bool
    ) -> None:
        self._communicator = communicator
        self._codec = codec
        self._device = device
        self._hierarchical = hierarchical
        first = communicator.open_queue("nodes" if hierarchical else "all")
        owners = first.intra_node if hierarchical else first.group
        self._layout = Layout(numels, owners.world_size)
        # What is coded, and among which ranks: everything, or between nodes this rank's share.
        coders = first.inter_node if hierarchical else first.group
        coded = self._layout.share(owners.rank, coders.world_size) if hierarchical else self._layout
        self._sums = Sums(coded, coders.world_size, coders.rank)
        self._queues = [first]
        if hierarchical:
            self._queues.append(communicator.open_queue("nodes"))
        else:
            # The last part sends nothing.
            self._queues += [communicator.open_queue("all") for _ in range(0 if self._sums.is_whole else 1)]
            self._queues.append(communicator.open_queue("none"))
        self.feedback: ErrorFeedback | None = None
        self._peer_memory: PeerMemory | None = None
        self._planned: list[PlannedTensor] = []

    def plan(self, dtype: torch.dtype, places: Places, *, is_exact: bool = False) -> PlannedTensor:
        """Plans the messages of tensors that hold the same parameters, the same on all ranks."""
        codec = "none" if is_exact else self._codec
        self._planned.append(PlannedTensor(self._plan(codec, dtype, places), Scratch(), is_exact))
        return self._planned[-1]

    def all_reduce(
        self,
        label: str,
        tensor: torch.Tensor,
        planned: PlannedTensor,
        divisor: int,
        prepare: Callable[[], None] | None = None,
        *,
        from_pending: bool = False,
    ) -> torch.futures.Future[torch.Tensor]:
        """Submits an all_reduce; the future delivers the sum divided by `divisor`, in the tensor itself.

        Args:
            label: What this is, for messages.
            tensor: One-dimensional; overwritten.
            planned: Its messages; one tensor at a time is under way with them.
            divisor: Number of ranks for a mean, 1 for a sum.
            prepare: Changes the tensor first, where the all_reduce runs.
            from_pending: Whether messages go on from pending residuals (see `ErrorFeedback.take`).
        """
        steps = self._steps(tensor, planned, divisor, from_pending=from_pending)
        if prepare is not None:
            steps.insert(0, Step("prepare", steps[0].queue, prepare, waits=False))
        return self._communicator.submit(label, tensor, *steps)

    def forget(self) -> None:
        """Drops the memory of all plans, which are not used again. Called when nothing is pending."""
        streams = [queue.stream for queue in self._queues if queue.stream is not None]
        for scratch in [*(planned.kept for planned in self._planned), *(queue.scratch for queue in self._queues)]:
            scratch.clear(streams)
        self._planned.clear()

    @property
    def allocated_bytes(self) -> int:
        """Bytes of memory held for messages."""
        scratches = [*(planned.kept for planned in self._planned), *(queue.scratch for queue in self._queues)]
        return sum(scratch.allocated_bytes for scratch in scratches)

    def share_memory(self, largest: Sequence[tuple[torch.dtype, Places]]) -> None:
        """Uses one kernel over memory that the GPUs of a node share in the place of messages, where it can. Collective.

        Args:
            largest: Dtype and places of the largest tensors.
        """
        queue, topology = self._queues[0], self._communicator.topology
        if self._hierarchical or queue.group.world_size == 1:
            return
        plans = [plan for dtype, places in largest if isinstance(plan := self._plan(self._codec, dtype, places), TwoShotPlan)]
        is_one_node = len(topology.nodes) == 1
        timeout = self._communicator.timeout
        self._peer_memory = open_peer_memory(queue.group, plans, self._device, timeout, is_one_node=is_one_node)
        if self._peer_memory is not None:
            self._communicator.watch(self._peer_memory)

    def keep_residuals(self) -> None:
        """Turns error feedback on, where anything is quantised."""
        if self._sums.world_size > 1 and self.feedback is None:
            layout = self._sums.layout
            places = [self._residual_places(parameter) for parameter in range(len(layout.numels))]
            self.feedback = ErrorFeedback(places, layout.numel, self._sums.numel, self._device)

    @property
    def residual_layout(self) -> str:
        """Which nodes the residuals belong to, in words: with hierarchy, who owns a block depends on them."""
        return f"nodes {self._communicator.topology.nodes}" if self._hierarchical else "any nodes"

    def _plan(self, codec: str, dtype: torch.dtype, places: Places) -> TwoShotPlan | HierarchicalPlan:
        first = self._queues[0]
        if self._hierarchical:
            groups = first.intra_node, first.inter_node
            return HierarchicalPlan.build(codec, dtype, self._layout, self._sums.layout, places, *groups)
        pieces = pieces_of(self._layout, places)
        return TwoShotPlan.build(codec, dtype, pieces, first.group.world_size, first.group.rank)

    def _steps(self, tensor: torch.Tensor, planned: PlannedTensor, divisor: int, *, from_pending: bool) -> list[Step]:
        plan, kept = planned.plan, planned.kept
        feedback = self.feedback.take(from_pending=from_pending) if self.feedback is not None and not planned.is_exact else None
        first, second = self._queues[:2]
        if isinstance(plan, HierarchicalPlan):
            groups = first.intra_node, first.inter_node, second.intra_node
            memory = kept, first.scratch, second.scratch
            return self._cut(
                plan.phases,
                hierarchical_all_reduce_steps(tensor, plan, *groups, *memory, divisor=divisor, feedback=feedback),
                first_waits=True,
            )
        if self._peer_memory is not None:
            run = partial(self._peer_memory.all_reduce, tensor, plan, divisor=divisor, feedback=feedback)
            return [Step("all_reduce", first, run, waits=False)]
        groups_of_phases = first.group, first.group if plan.is_whole else second.group
        steps = compressed_all_reduce_steps(tensor, plan, *groups_of_phases, kept, divisor=divisor, feedback=feedback)
        return self._cut(plan.phases, steps, first_waits=False)

    def _cut(self, phases: Sequence[str], steps: Steps, *, first_waits: bool) -> list[Step]:
        """Makes a step of each part of a collective, in the queue of that part."""
        run = partial(next, steps, None)
        queues: list[CommQueue] = self._queues
        return [
            Step(name, queue, run, waits=first_waits or k > 0) for k, (name, queue) in enumerate(zip(phases, queues, strict=True))
        ]

    def _residual_places(self, parameter: int) -> list[ResidualPlace]:
        spans = self._sums.layout.spans(parameter)
        if not spans:
            return []
        whole = spans[0].place, self._sums.layout.numels[parameter]  # its spans follow one another
        own = [(place, span.numel) for span in spans if (place := self._sums.place(span)) is not None]
        servers = [whole] if self._sums.is_whole else own
        return [ResidualPlace("worker", *whole), *(ResidualPlace("server", *server) for server in servers)]
