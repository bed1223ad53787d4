"""`lightning-accel test`: every codec and algorithm on the processes that there are, against the specification.

A model whose gradients are given trains for some steps on each rank. Each rank also computes, by the specification and in plain
torch on the CPU, what all ranks must hold after each step.
"""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn

from lightning_accel.algorithms import (
    Algorithm,
    AsyncAverage,
    ByteGrad,
    Decentralized,
    GradientAllReduce,
    LowPrecisionDecentralized,
    QAdamAlgorithm,
)
from lightning_accel.compression import operations
from lightning_accel.compression.codecs import CODECS, uses_feedback
from lightning_accel.compression.plan import Plan
from lightning_accel.data_parallel.wrap import unwrap, wrap
from lightning_accel.launch.process_group import (
    destroy_process_group,
    get_local_rank,
    get_local_world_size,
    init_process_group,
)
from lightning_accel.native import DTYPES, kernels
from lightning_accel.optim.qadam import QAdam
from lightning_accel.reference import bytegrad, codecs, decentralized, gradient_allreduce, low_precision_decentralized, qadam
from lightning_accel.reference.collectives import Residuals
from lightning_accel.reference.weights import consensus
from lightning_accel.version import __version__

_STEPS = 5

_WARMUP_STEPS = 2

_LEARNING_RATE = 0.5
"""A power of two: its products are exact, so no fused multiply-add can change a bit."""

_SHAPES = ((2000,), (513,), (7, 30), (1,))
"""Several blocks with a tail, a block and one element, less than a block, one element."""

_ROUNDING = 1e-5
"""Largest difference where the order of a sum, or an operation of torch on a GPU, is not specified to the bit."""

_CODE_STEP = 0.05
"""Largest difference where such a rounding may change a code."""

_Weights = list[list[Tensor]]
"""Weights of each rank, by parameter."""


@dataclass(frozen=True)
class _Case:
    """An algorithm and its specification.

    Attributes:
        algorithm: Algorithm with its options.
        expect: Makes, from the first weights and the gradients of each step and rank, the weights after each step.
        allowed: Largest difference that counts as equal; 0 asks for the same bits.
        is_timed: Whether what ranks hold before the consensus depends on time.
    """

    algorithm: Algorithm
    expect: Callable[[list[Tensor], Sequence[_Weights]], Iterator[_Weights]]
    allowed: float = 0.0
    is_timed: bool = False


class _Given(nn.Module):
    """A model whose gradients are its inputs."""

    def __init__(self, weights: Sequence[Tensor]) -> None:
        super().__init__()
        self.weights = nn.ParameterList(weight.clone() for weight in weights)

    def forward(self, gradients: Sequence[Tensor]) -> Tensor:
        return torch.stack([(w * g).sum() for w, g in zip(self.weights, gradients, strict=True)]).sum()


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs all checks on this rank; rank 0 prints the table. Returns 1 on all ranks if anything differs on any. Collective."""
    parser = argparse.ArgumentParser(prog="lightning-accel test")
    parser.add_argument("device", choices=("cpu", "cuda"))
    kind = parser.parse_args(arguments).device
    started = time.perf_counter()
    is_joining = not dist.is_initialized()
    if is_joining:
        has_own_gpus = kind == "cuda" and get_local_world_size() <= torch.cuda.device_count()
        init_process_group("nccl" if has_own_gpus else "gloo")
    try:
        device = torch.device(f"cuda:{get_local_rank() % torch.cuda.device_count()}" if kind == "cuda" else "cpu")
        failures = _run(device, started)
    finally:
        if is_joining:
            destroy_process_group()
    return 1 if failures else 0


def _run(device: torch.device, started: float) -> int:
    rank, world_size = dist.get_rank(), dist.get_world_size()
    where = f"{world_size} ranks on {device.type} ({dist.get_backend()}), CPU kernels {kernels.instruction_set()}"
    _print(rank, f"lightning-accel {__version__}: {where}")
    count = failures = 0
    for kind, name, allowed, measure in _checks(device, world_size):
        differences: list[float] = [0.0] * world_size
        dist.all_gather_object(differences, measure(rank))
        worst = max(differences)
        has_failed = not worst <= allowed
        told = "equal" if worst == 0 else f"differs by {worst:.1e}, at most {allowed:.0e} allowed"
        _print(rank, f"{kind:<10} {name:<36} {'DIFFERENT' if has_failed else 'ok':<10} {told}")
        count, failures = count + 1, failures + has_failed
    result = f"{failures} of {count} checks FAILED" if failures else f"all {count} checks passed"
    _print(rank, f"{result} in {time.perf_counter() - started:.0f} s")
    return failures


def _checks(device: torch.device, world_size: int) -> Iterator[tuple[str, str, float, Callable[[int], float]]]:
    """Yields kind and name of each check, the difference that is allowed, and what measures it on a rank."""
    sets = kernels.instruction_sets() if device.type == "cpu" else [kernels.instruction_set()]
    for codec in CODECS:
        yield (
            "codec",
            f"{codec} ({', '.join(sets) if device.type == 'cpu' else 'cuda'})",
            0.0,
            partial(_measure_codec, codec, device, sets),
        )
    for case in _cases(device, world_size):
        options = vars(case.algorithm)
        name = " ".join([case.algorithm.name, *(options[key] for key in ("codec", "peer_selection_mode") if key in options)])
        yield "algorithm", name, case.allowed, partial(_measure_algorithm, case, device, world_size)


def _cases(device: torch.device, world_size: int) -> Iterator[_Case]:
    is_exact = device.type == "cpu" and world_size <= 2  # gloo's own all_reduce of more ranks sums in an order of its own
    yield _Case(
        GradientAllReduce(),
        partial(_expect_gradients, gradient_allreduce.gradient_allreduce),
        0.0 if world_size <= 2 else _ROUNDING,
    )
    for codec in CODECS:
        yield _Case(ByteGrad(codec, hierarchical=False), partial(_expect_bytegrad, codec))
    for codec in ("int8", "int4", "sign"):
        algorithm = QAdamAlgorithm(codec, hierarchical=False)
        yield _Case(algorithm, partial(_expect_qadam, codec), 0.0 if is_exact else _CODE_STEP)
    yield _Case(Decentralized("all", hierarchical=False), partial(_expect_decentralized, "all"))
    if world_size % 2 == 0:
        yield _Case(Decentralized("shift_one", hierarchical=False), partial(_expect_decentralized, "shift_one"))
    yield _Case(LowPrecisionDecentralized("int8", hierarchical=False), partial(_expect_low_precision, "int8"))
    yield _Case(AsyncAverage(sync_interval_ms=1), _expect_local, _ROUNDING, is_timed=True)


def _measure_codec(codec: str, device: torch.device, instruction_sets: Sequence[str], rank: int) -> float:
    """Returns the largest difference of decoded values from the specification's, over dtypes, sizes and instruction sets."""
    before, worst = kernels.instruction_set(), 0.0
    try:
        for name in instruction_sets:
            kernels.use_instruction_set(name)
            for dtype in DTYPES:
                for numel in (1, 511, 3000):
                    values = _normal((numel,), seed=numel).to(dtype)
                    values[numel // 2] = float("nan") if numel == 511 else 0.0
                    specified = codecs.quantise(values.to(codecs.value_dtype(codec, dtype)), codec).to(dtype)
                    plan = Plan(codec, dtype, [0], [numel])
                    wire, decoded = torch.zeros(plan.wire_bytes, dtype=torch.uint8, device=device), values.to(device)
                    operations.encode(plan, decoded, wire)
                    operations.decode(plan, wire, decoded)
                    worst = max(worst, _difference(decoded, codecs.canonical(specified)))
    finally:
        kernels.use_instruction_set(before)
    return worst


def _measure_algorithm(case: _Case, device: torch.device, world_size: int, rank: int) -> float:
    """Trains, and returns the largest difference of weights from the specification's, after any step and at the end."""
    start = [_normal(shape, seed=place) for place, shape in enumerate(_SHAPES)]
    gradients = [
        [
            [_normal(shape, seed=1 + place + 10 * (r + world_size * step)) for place, shape in enumerate(_SHAPES)]
            for r in range(world_size)
        ]
        for step in range(_STEPS)
    ]
    model = _Given(start).to(device)
    optimizer: torch.optim.Optimizer
    if isinstance(case.algorithm, QAdamAlgorithm):
        optimizer = QAdam(model.parameters(), lr=_LEARNING_RATE, warmup_steps=_WARMUP_STEPS, fused=False, foreach=False)
    else:
        optimizer = torch.optim.SGD(model.parameters(), lr=_LEARNING_RATE)
    worst, expected = 0.0, [start] * world_size
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what learns badly computes well
        ddp = wrap(model, optimizer, case.algorithm)
    try:
        for given, expected in zip(gradients, case.expect(start, gradients), strict=True):
            optimizer.zero_grad()
            ddp([gradient.to(device) for gradient in given[rank]]).backward()
            optimizer.step()
            if not case.is_timed:
                worst = max(worst, *map(_difference, model.weights, expected[rank]))
        unwrap(ddp)
    finally:
        ddp.replica.close()
    return max(worst, *map(_difference, model.weights, consensus(expected)))


def _expect_gradients(
    mean: Callable[[_Weights], list[Tensor]], start: list[Tensor], gradients: Sequence[_Weights]
) -> Iterator[_Weights]:
    weights = start
    for given in gradients:
        weights = _descend(weights, mean(given))
        yield [weights] * len(given)


def _expect_bytegrad(codec: str, start: list[Tensor], gradients: Sequence[_Weights]) -> Iterator[_Weights]:
    has_feedback = uses_feedback(codec, None)
    residuals = [Residuals.zeros(len(gradients[0]), tensor.numel()) for tensor in start] if has_feedback else None
    return _expect_gradients(partial(bytegrad.bytegrad, codec=codec, residuals=residuals), start, gradients)


def _expect_qadam(codec: str, start: list[Tensor], gradients: Sequence[_Weights]) -> Iterator[_Weights]:
    world_size = len(gradients[0])
    optimizer = qadam.QAdam(start, world_size, lr=_LEARNING_RATE, warmup_steps=_WARMUP_STEPS, codec=codec)
    for given in gradients:
        optimizer.step(given)
        yield [optimizer.parameters] * world_size


def _expect_decentralized(mode: str, start: list[Tensor], gradients: Sequence[_Weights]) -> Iterator[_Weights]:
    weights = [start] * len(gradients[0])
    for communication, given in enumerate(gradients):
        weights = list(map(_descend, decentralized.decentralized(weights, communication, mode), given))
        yield weights


def _expect_low_precision(codec: str, start: list[Tensor], gradients: Sequence[_Weights]) -> Iterator[_Weights]:
    weights = [start] * len(gradients[0])
    ring = low_precision_decentralized.LowPrecisionDecentralized(start, len(weights), codec)
    for given in gradients:
        weights = list(map(_descend, ring.exchange(weights), given))
        yield weights


def _expect_local(start: list[Tensor], gradients: Sequence[_Weights]) -> Iterator[_Weights]:
    """Averagings keep the sum over ranks, so that the consensus is that of ranks which did not communicate."""
    weights = [start] * len(gradients[0])
    for given in gradients:
        weights = list(map(_descend, weights, given))
        yield weights


def _descend(weights: list[Tensor], gradients: list[Tensor]) -> list[Tensor]:
    return [weight - _LEARNING_RATE * gradient for weight, gradient in zip(weights, gradients, strict=True)]


def _normal(shape: tuple[int, ...], seed: int) -> Tensor:
    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu")


def _difference(held: Tensor, expected: Tensor) -> float:
    """Returns the largest difference of two tensors; infinity if one has a NaN where the other has none."""
    held = held.detach().cpu().reshape(expected.shape)
    if torch.equal(held.isnan(), expected.isnan()):
        return float((held.double() - expected.double()).nan_to_num().abs().max())
    return float("inf")


def _print(rank: int, line: str) -> None:
    if rank == 0:
        print(line, flush=True)


if __name__ == "__main__":
    sys.exit(main())
