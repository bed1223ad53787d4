"""The loop that a program describes, as a user would write it, for one rank.

The loop yields a *moment* wherever ranks communicate. With a wrapped model nobody listens: the package has done its work by then.
The simulation (`simulation.py`) has plain models, and does at these moments what `lightning_accel.reference` says.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fuzz.programs import Evaluate, ExtraRound, Fail, Model, Operation, Optimizer, Program, Remake, Resume, Train
from lightning_accel import QAdam

QADAM_WARMUP_STEPS = 2
BATCH = 3


class Planned(Exception):
    """What `Fail` raises."""


@dataclass(frozen=True)
class Moment:
    """A point at which ranks communicate: "forward", "reduce", "before_step", "after_step", "consensus" or "resume"."""

    what: str
    optimizer: torch.optim.Optimizer | None = None


class Network(nn.Module):
    """A network as `Model` describes it."""

    def __init__(self, model: Model, rank: int, ranks: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(7)
        first = model.widths[0]
        self.embedding = nn.Embedding(model.embedding, first) if model.embedding else None
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in zip(model.widths, model.widths[1:], strict=False))
        last = model.widths[-1]
        self.norm = nn.BatchNorm1d(first) if model.batch_norm else None
        self.square = nn.Linear(first, first) if model.tied else None
        self.again = nn.Linear(first, first, bias=False) if model.tied else None
        self.last = nn.Linear(last, 2)
        self.frozen = nn.Linear(first, first).requires_grad_(False) if model.frozen else None
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / parameter.shape[-1] ** 0.5)
        if self.again is not None:
            self.again.weight = self.square.weight
        self.last.to(getattr(torch, model.last_dtype))
        self.teacher = copy.deepcopy(self.layers[0]).requires_grad_(False) if model.teacher else None
        self.grows = model.growing and rank == ranks - 1
        if model.growing:
            self.register_buffer("cache", torch.zeros(1), persistent=False)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        values = inputs
        if self.grows:
            self.cache = torch.zeros(self.cache.numel() + 40)
        if self.embedding is not None:
            rows = (inputs.abs() * 1000).long()[:, :2] % self.embedding.num_embeddings
            values = values + self.embedding(rows).sum(1)
        if self.norm is not None:
            values = self.norm(values)
        if self.square is not None:
            values = self.again(torch.tanh(self.square(values)))
        if self.frozen is not None:
            values = values + self.frozen(values)
        for layer in self.layers:
            values = torch.tanh(layer(values))
        return self.last(values.to(self.last.weight.dtype)).float()

    def parts(self) -> list[nn.Module]:
        """What optimizers may have."""
        return [part for part in (self.last, *self.layers, self.embedding, self.square, self.norm) if part is not None]


def make_optimizer(spec: Optimizer, network: Network, lr: float) -> torch.optim.Optimizer:
    """The optimizer of the parts that it names."""
    parts = network.parts()
    chosen = {place % len(parts) for place in spec.parts} or set(range(len(parts)))
    parameters = [p for place in sorted(chosen) for p in parts[place].parameters()]
    if spec.kind == "adam":
        return torch.optim.Adam(parameters, lr, foreach=False)
    if spec.kind == "qadam":
        return QAdam(parameters, lr, warmup_steps=QADAM_WARMUP_STEPS)
    return torch.optim.SGD(parameters, lr, momentum=0.5 if spec.kind == "momentum" else 0.0)


class Loop:
    """One rank's training.

    Args:
        program: What to do.
        rank: Of this rank.
        wrap: Gets network, optimizers that are told and DDP's bucket size, and returns what is called and what has `no_sync`.
        resume: Gets the loop and the operation; saves, and puts new objects in the loop's place unless uninterrupted.

    Attributes:
        updates: What optimizers have added to each weight, by name.
        paths: Largest element of the sum of the updates' magnitudes, by name.
        applied: Sum of the gradients with which optimizers have stepped, by name.
    """

    def __init__(self, program: Program, rank: int, wrap: Callable[..., Any], resume: Callable[..., Any]) -> None:
        self.program, self.rank, self._wrap, self._resume = program, rank, wrap, resume
        self.batches = 0
        self.updates: dict[str, torch.Tensor] = {}
        self.paths: dict[str, float] = {}
        self.applied: dict[str, torch.Tensor] = {}
        self._names: dict[int, str] = {}
        self.optimizers: list[torch.optim.Optimizer] = []
        self.make(program.bucket_cap_mb)
        self.ema = copy.deepcopy(self.network)
        self._first = {name: weight.detach().clone() for name, weight in self.network.named_parameters()}

    def make(self, bucket_cap_mb: float) -> None:
        """Makes network and optimizers, and wraps them."""
        program = self.program
        self.network = Network(program.model, self.rank, program.ranks)
        self._names = {id(weight): name for name, weight in self.network.named_parameters()}
        self.optimizers = [make_optimizer(spec, self.network, program.lr) for spec in program.optimizers]
        told = [made for made, spec in zip(self.optimizers, program.optimizers, strict=True) if spec.told]
        self.ddp = self._wrap(self.network, told, bucket_cap_mb)
        for optimizer in self.optimizers:
            self._watch(optimizer)

    def run(self) -> Iterator[Moment]:
        """Does all operations, and ends with a consensus."""
        for operation in self.program.operations:
            yield from self._do(operation)
        yield from self._consensus()

    def _do(self, operation: Operation) -> Iterator[Moment]:
        match operation:
            case Train():
                for _ in range(operation.times):
                    yield from self._round(operation)
            case Evaluate():
                yield from self._evaluate(operation)
            case Resume():
                self._zero_grad()
                yield Moment("resume")
                self._resume(self, operation)
            case Remake(optimizer=place):
                place %= len(self.optimizers)
                self.optimizers[place] = make_optimizer(self.program.optimizers[place], self.network, self.program.lr)
                self._watch(self.optimizers[place])
            case Fail(rank=rank) if rank == self.rank:
                handle = self.network.register_forward_pre_hook(_raise)
                try:
                    yield from self._round(Train())
                finally:
                    handle.remove()
            case Fail():
                yield from self._round(Train())
            case ExtraRound(rank=rank) if rank == self.rank:
                yield from self._round(Train())

    def _round(self, train: Train) -> Iterator[Moment]:
        steps = self.optimizers if train.only is None else [self.optimizers[train.only % len(self.optimizers)]]
        skips = self.rank in train.skipped_on
        for optimizer in steps if train.toggled else [None]:
            with self._toggled(optimizer):
                for _ in range(train.unsynced):
                    yield from self._micro_batch(synced=False)
                for _ in range(train.backwards):
                    yield from self._micro_batch(synced=True)
                for stepping in steps if optimizer is None else [optimizer]:
                    yield from self._step(stepping, skips=skips)
            self._zero_grad()

    def _micro_batch(self, *, synced: bool) -> Iterator[Moment]:
        yield Moment("forward")
        with contextlib.nullcontext() if synced else self.ddp.no_sync():
            self._loss().backward()
        if synced:
            yield Moment("reduce")

    def _loss(self) -> torch.Tensor:
        # Of a short cycle, so that what is lost again and again adds up.
        generator = torch.Generator().manual_seed(10 * (self.batches % 3) + self.rank)
        self.batches += 1
        inputs = torch.randn(BATCH, self.program.model.widths[0], generator=generator)
        # Its gradient is bounded: a program that diverges by itself tells nothing.
        return torch.nn.functional.smooth_l1_loss(self.ddp(inputs), inputs[:, :2])

    def _step(self, optimizer: torch.optim.Optimizer, *, skips: bool) -> Iterator[Moment]:
        yield Moment("before_step", optimizer)
        if not skips:
            optimizer.step()
            self._follow()
        yield Moment("after_step", None if skips else optimizer)

    @torch.no_grad()
    def _follow(self) -> None:
        """Moves the teacher and the average over time."""
        if self.network.teacher is not None:
            for old, new in zip(self.network.teacher.parameters(), self.network.layers[0].parameters(), strict=True):
                old.lerp_(new, 0.5)
        for old, new in zip(self.ema.parameters(), self.network.parameters(), strict=True):
            old.lerp_(new, 0.5)

    def _evaluate(self, operation: Evaluate) -> Iterator[Moment]:
        if operation.accumulating:
            yield from self._micro_batch(synced=False)
        with self._ema_in_place() if operation.ema else contextlib.nullcontext():
            yield from self._consensus()
            self.network.eval()
            with torch.no_grad():
                self.ddp(torch.ones(BATCH, self.program.model.widths[0]))
            self.network.train()
        if operation.accumulating:
            yield from self._micro_batch(synced=True)
            for optimizer in self.optimizers:
                yield from self._step(optimizer, skips=False)
            self._zero_grad()

    def _consensus(self) -> Iterator[Moment]:
        if hasattr(self.ddp, "replica"):
            self.ddp.replica.consensus()
        yield Moment("consensus")

    def _zero_grad(self) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        self.network.zero_grad()

    @contextlib.contextmanager
    def _toggled(self, optimizer: torch.optim.Optimizer | None) -> Iterator[None]:
        own = None if optimizer is None else {id(p) for group in optimizer.param_groups for p in group["params"]}
        others = [p for p in self.network.parameters() if p.requires_grad and own is not None and id(p) not in own]
        for parameter in others:
            parameter.requires_grad_(False)
        try:
            yield
        finally:
            for parameter in others:
                parameter.requires_grad_(True)

    @contextlib.contextmanager
    def _ema_in_place(self) -> Iterator[None]:
        weights = [weight.detach().clone() for weight in self.network.parameters()]
        self._put(list(self.ema.parameters()))
        yield
        self._put(weights)

    @torch.no_grad()
    def _put(self, weights: list[torch.Tensor]) -> None:
        for weight, value in zip(self.network.parameters(), weights, strict=True):
            weight.copy_(value)

    def _watch(self, optimizer: torch.optim.Optimizer) -> None:
        """Sums what an optimizer uses and does; the package's own hooks run before."""
        before: dict[str, torch.Tensor] = {}

        def note(*arguments: Any) -> None:
            for parameter in (p for group in optimizer.param_groups for p in group["params"]):
                name = self._names[id(parameter)]
                before[name] = parameter.detach().clone()
                if parameter.grad is not None:
                    self.applied[name] = self.applied.get(name, 0) + parameter.grad.double()

        def add(*arguments: Any) -> None:
            for parameter in (p for group in optimizer.param_groups for p in group["params"]):
                name = self._names[id(parameter)]
                update = parameter.detach().double() - before[name].double()
                self.updates[name] = self.updates.get(name, 0) + update
                self.paths[name] = self.paths.get(name, 0.0) + float(update.abs().max())

        optimizer.register_step_pre_hook(note)
        optimizer.register_step_post_hook(add)

    def first(self, name: str) -> torch.Tensor:
        """A weight before all steps."""
        return self._first[name]


def _raise(*arguments: Any) -> None:
    raise Planned("planned")
