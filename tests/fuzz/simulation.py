"""A program with all ranks in this process: plain models, and `lightning_accel.reference` wherever ranks communicate."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

import torch

from fuzz.loop import Loop
from fuzz.programs import Program, Remake, Resume
from fuzz.run import Outcome, outcome_of
from lightning_accel.reference.bytegrad import bytegrad
from lightning_accel.reference.collectives import Residuals
from lightning_accel.reference.decentralized import decentralized
from lightning_accel.reference.gradient_allreduce import gradient_allreduce
from lightning_accel.reference.low_precision_decentralized import LowPrecisionDecentralized
from lightning_accel.reference.weights import consensus


def can_simulate(program: Program) -> bool:
    """Whether the reference can express the program: no planned failure, rounds whose ends it knows."""
    if program.may_fail or program.algorithm in ("async", "qadam") or program.model.growing:
        return False
    if not is_exact(program) and any(optimizer.kind == "adam" for optimizer in program.optimizers):
        return False  # Adam makes whole steps of the last bits
    return all(optimizer.told for optimizer in program.optimizers) and not program.has(Remake)


def is_exact(program: Program) -> bool:
    """Whether every bit is specified; gloo's own sum of three and more is not in rank order."""
    is_own_sum = program.algorithm == "gradient_allreduce" and not (program.options.get("hierarchical") and program.nodes > 1)
    return not is_own_sum or program.ranks == 2


def simulate(program: Program) -> list[Outcome]:
    """Gives each rank's outcome; `Resume` only saves."""
    simulation = _Simulation(program)
    runs = [loop.run() for loop in simulation.loops]
    while True:
        moments = [next(run, None) for run in runs]
        if moments[0] is None:
            outcomes = [outcome_of(loop) for loop in simulation.loops]
            outcomes[0].peaks = simulation.peaks_of_uses()
            return outcomes
        simulation.at(moments)


class _Plain:
    """What stands in DDP's place."""

    def __init__(self, network: torch.nn.Module) -> None:
        self._network = network

    def __call__(self, inputs: torch.Tensor) -> torch.Tensor:
        return self._network(inputs)

    def no_sync(self) -> Any:
        return contextlib.nullcontext()


class _Simulation:
    def __init__(self, program: Program) -> None:
        self.program = program
        self.loops = [Loop(program, rank, lambda network, *_: _Plain(network), _save_nothing) for rank in range(program.ranks)]
        per_node = program.ranks // program.nodes
        nodes = [list(range(m * per_node, (m + 1) * per_node)) for m in range(program.nodes)]
        is_flat = program.nodes == 1 or program.options.get("hierarchical", "auto") is False
        if program.algorithm == "gradient_allreduce" and "hierarchical" not in program.options:
            is_flat = True
        self.nodes = None if is_flat else nodes
        self.peaks: dict[str, float] = {}
        self._residuals: dict[str, Residuals] = {}
        self._written: dict[str, Residuals] = {}
        self._is_zeroed = True
        self._round = "between"
        self._rounds = 0
        self._arriving: list[list[torch.Tensor]] | None = None
        self._ring: LowPrecisionDecentralized | None = None

    def at(self, moments: Sequence[Any]) -> None:
        getattr(self, f"_{moments[0].what}")(moments)

    def peaks_of_uses(self) -> dict[str, float]:
        """The largest gradient of any rank, times the number of optimizers that have used it, by name."""
        loop = self.loops[0]
        owned = [id(p) for optimizer in loop.optimizers for group in optimizer.param_groups for p in group["params"]]
        named = loop.network.named_parameters()
        return {name: self.peaks[name] * owned.count(id(p)) for name, p in named if name in self.peaks}

    def weights(self) -> list[list[torch.nn.Parameter]]:
        """Of each rank: those that are trained, also while toggled off."""
        frozen = ("frozen.", "teacher.")
        return [[p for name, p in loop.network.named_parameters() if not name.startswith(frozen)] for loop in self.loops]

    def _names(self) -> list[str]:
        ids = {id(p): name for name, p in self.loops[0].network.named_parameters()}
        return [ids[id(p)] for p in self.weights()[0]]

    def _forward(self, moments: Any) -> None:
        if not self.program.exchanges_weights:
            return
        if self._round == "reduced":
            self._end_round()
        if self._round == "between":
            self._round = "open"
            self._begin_round()

    def _reduce(self, moments: Any) -> None:
        if self.program.exchanges_weights:
            if self._round == "open":
                self._round = "reduced"
            return
        if self._is_zeroed:
            self._written.clear()
            self._is_zeroed = False
        for name, parameters in zip(self._names(), zip(*self.weights(), strict=True), strict=True):
            if parameters[0].grad is None or not parameters[0].requires_grad:
                continue
            largest = max(float(parameter.grad.abs().max()) for parameter in parameters)
            self.peaks[name] = max(self.peaks.get(name, 0.0), largest)
            result = self._reduced(name, [parameter.grad for parameter in parameters])
            for parameter in parameters:
                parameter.grad = result.clone()

    def _reduced(self, name: str, gradients: list[torch.Tensor]) -> torch.Tensor:
        options, own = self.program.options, [[gradient] for gradient in gradients]
        if self.program.algorithm == "gradient_allreduce":
            return gradient_allreduce(own, nodes=self.nodes)[0]
        codec = options.get("codec", "int8")
        if not self.program.has_feedback:
            return bytegrad(own, codec, nodes=self.nodes)[0]
        # A second message of a round contains the result of the first.
        old = (
            self._written.get(name)
            or self._residuals.get(name)
            or Residuals.zeros(len(self.nodes or gradients), gradients[0].numel())
        )
        written = self._written[name] = Residuals(list(old.workers), old.server)
        return bytegrad(own, codec, nodes=self.nodes, residuals=[written])[0]

    def _before_step(self, moments: Any) -> None:
        self._is_zeroed = True  # a round's gradients are zeroed after its steps
        # A rank whose scaler skips does it at its next forward; nothing looks at its weights before.
        if self.program.exchanges_weights and self._round != "between":
            self._end_round()

    def _after_step(self, moments: Any) -> None:
        optimizer = moments[0].optimizer
        if optimizer is None:
            return
        names = {id(p): name for name, p in self.loops[0].network.named_parameters()}
        for parameter in (p for group in optimizer.param_groups for p in group["params"] if p.grad is not None):
            if (name := names[id(parameter)]) in self._written:
                self._residuals[name] = self._written.pop(name)

    def _consensus(self, moments: Any) -> None:
        if not self.program.exchanges_weights:
            return
        if self._round == "reduced":
            self._end_round()
        self._arriving = None
        weights = self.weights()
        if self._ring is not None or self.program.algorithm == "low_precision_decentralized":
            self._ring = self._ring or self._new_ring(weights[0])
            agreed = self._ring.consensus(weights)
        else:
            agreed = consensus(weights, self.nodes)
        self._put([agreed for _ in weights])
        buffers = [list(loop.network.buffers()) for loop in self.loops]
        for tensors, value in zip(zip(*buffers, strict=True), consensus(buffers, self.nodes), strict=True):
            for tensor in tensors:
                tensor.copy_(value)

    def _resume(self, moments: Any) -> None:
        self._consensus(moments)

    def _begin_round(self) -> None:
        if self.program.algorithm == "low_precision_decentralized":
            if self._ring is None:
                self._ring = self._new_ring(self.weights()[0])
            elif self._rounds % self.program.options.get("communication_interval", 1) == 0:
                self._put(self._ring.exchange(self.weights()))
        elif self._rounds % (interval := self.program.options.get("communication_interval", 1)) == 0:
            mode = self.program.options.get("peer_selection_mode", "all")
            weights = [[weight.detach() for weight in own] for own in self.weights()]
            self._arriving = decentralized(weights, self._rounds // interval, mode, nodes=self.nodes)

    def _end_round(self) -> None:
        if self._arriving is not None:
            self._put(self._arriving)
        self._arriving = None
        self._round = "between"
        self._rounds += 1

    def _new_ring(self, weights: list[torch.nn.Parameter]) -> LowPrecisionDecentralized:
        values = [weight.detach().clone() for weight in weights]
        return LowPrecisionDecentralized(values, self.program.ranks, self.program.options.get("codec", "int8"), nodes=self.nodes)

    @torch.no_grad()
    def _put(self, values: Sequence[Sequence[torch.Tensor]]) -> None:
        for parameters, own in zip(self.weights(), values, strict=True):
            for parameter, value in zip(parameters, own, strict=True):
                parameter.copy_(value)


def _save_nothing(loop: Loop, operation: Resume) -> None:
    """The uninterrupted program saves, which a simulation need not do."""
