"""What must hold of every program, and what is known not to hold yet."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from fuzz.programs import ExtraRound, Fail, Program, Remake, Resume
from fuzz.run import Outcome, Pool
from fuzz.simulation import can_simulate, is_exact, simulate

_KEPT_BACK = {"int8": 0.02, "int4": 0.2, "sign": 8.0, "minmax_uint8": 0.02, "fp16": 0.01, "bf16": 0.02, "none": 0.001}
"""With error feedback, the largest part of a gradient that may be kept back at any time. int4 loses at most 1/14 of the largest
element in a code, on each worker and once more on the server; a residual enlarges the next value, and a block may be larger
for one rank than for the mean."""


_LATE = ("stuck", "untyped error", "some ranks succeed", "communication fails")


@dataclass(frozen=True)
class Finding:
    """Something that must not be.

    Attributes:
        kind: What it is, in a word or two.
        program: What shows it.
        detail: What was seen.
    """

    kind: str
    program: Program
    detail: str

    @property
    def known_as(self) -> str | None:
        """Why it is expected, if it is."""
        return next((reason for reason, is_it in KNOWN.items() if is_it(self)), None)


def _known(*kinds: str, where: Callable[[Program], bool]) -> Callable[[Finding], bool]:
    return lambda finding: finding.kind in kinds and where(finding.program)


def check(program: Program, pool: Pool) -> list[Finding]:
    """Runs a program, and others like it where they must agree; gives what is wrong.

    A busy machine makes ranks late: what has to do with time is a finding only if it is seen twice.
    """
    findings = list(_findings(program, pool))
    if not program.may_fail and any(finding.kind in _LATE for finding in findings):
        again = {finding.kind for finding in _findings(program, pool)}
        findings = [finding for finding in findings if finding.kind not in _LATE or again & set(_LATE)]
    return findings


def _findings(program: Program, pool: Pool) -> Iterator[Finding]:
    def found(kind: str, detail: str) -> Finding:
        return Finding(kind, program, detail)

    outcomes = pool.run(program)
    if (wrong := failure(program, outcomes)) is not None:
        yield found(*wrong)
    if any(outcome.status != "done" for outcome in outcomes):
        return
    if not_finite(program, outcomes) and not_finite(program, _at_full_precision(program)):
        return  # it diverges by itself
    for rule in (not_finite, ranks_differ, lost_steps):
        if wrong := rule(program, outcomes):
            yield found(*wrong)
    saving = replace(program, uninterrupted=True)
    if can_simulate(program):
        expected = simulate(saving)
        exact = is_exact(program)
        compared = saving if program.has(Resume) else program
        if wrong := difference(pool.run(saving) if compared is saving else outcomes, expected, exact=exact):
            yield found("differs from the reference", wrong)
    if program.algorithm == "async":
        return  # what it does depends on time
    twins = []
    if program.has(Resume) and is_exact(program):  # a resumed run's first backward has other buckets
        twins.append(("resumed differs from uninterrupted", saving))
    if is_exact(program):
        other = 0.0003 if program.bucket_cap_mb == 25.0 else 25.0
        twins.append(("buckets change the result", replace(program, bucket_cap_mb=other)))
    for kind, twin in twins:
        others = pool.run(twin)
        if (wrong := failure(twin, others)) is not None:
            yield Finding(wrong[0], twin, wrong[1])
        elif wrong := difference(others, outcomes, exact=True):
            yield found(kind, wrong)
    if program.has_feedback:
        still = replace(program, lr=0.0)
        if wrong := kept_back(program, pool.run(still), _at_full_precision(still)):
            yield found("error feedback loses", wrong)


def _at_full_precision(program: Program) -> list[Outcome]:
    return simulate(replace(program, algorithm="gradient_allreduce", options={}, uninterrupted=True))


def failure(program: Program, outcomes: Sequence[Outcome]) -> tuple[str, str] | None:
    """What is wrong with how a program failed, if it did: our own error on all ranks, in time, is right."""
    detail = "; ".join(f"rank {r}: {o.status} {o.error} {o.where}" for r, o in enumerate(outcomes))
    statuses = {outcome.status for outcome in outcomes}
    if statuses == {"done"}:
        return ("a failure passed", detail) if program.has(Fail) else None
    if "died" in statuses:
        return "a process died", detail
    if "stuck" in statuses:
        return "stuck", detail
    if not all(outcome.is_typed for outcome in outcomes):
        return "untyped error", detail
    if "done" in statuses:
        return "some ranks succeed", detail
    if not program.may_fail and any("CommunicationError" in outcome.error for outcome in outcomes):
        return "communication fails", detail
    return None


def not_finite(program: Program, outcomes: Sequence[Outcome]) -> tuple[str, str] | None:
    """Whether NaN or Inf came out."""
    for rank, outcome in enumerate(outcomes):
        for name, tensor in outcome.tensors.items():
            if tensor.is_floating_point() and not tensor.isfinite().all():
                return "not finite", f"rank {rank}, {name}"
    return None


def ranks_differ(program: Program, outcomes: Sequence[Outcome]) -> tuple[str, str] | None:
    """Whether, after a consensus, ranks differ: in parameters, or in any floating tensor where weights are exchanged."""
    for name, tensor in outcomes[0].tensors.items():
        is_buffer = name.startswith("norm.running")
        if name == "cache" or not tensor.is_floating_point() or (is_buffer and not program.exchanges_weights):
            continue  # DDP broadcasts buffers before a forward, not after the last
        for rank, outcome in enumerate(outcomes[1:], start=1):
            if not _same_bits(tensor, outcome.tensors[name]):
                distance = (tensor.double() - outcome.tensors[name].double()).abs().max()
                return "ranks differ", f"{name}: rank {rank} is {distance:.3g} from rank 0"
    return None


def lost_steps(program: Program, outcomes: Sequence[Outcome]) -> tuple[str, str] | None:
    """Whether the ranks' mean has moved by another way than what their optimizers have added.

    Exchanges change no sum. They round, bfloat16 to 1/256 of a weight, and a codec that loses to some part of the way.
    """
    rounds = sum(train.times * len(program.optimizers) for train in program.trains) + len(program.operations)
    is_lossy = program.algorithm == "low_precision_decentralized" and program.options.get("codec", "int8") != "none"
    for name in outcomes[0].trainable:
        drift = sum(outcome.drift[name] for outcome in outcomes) / len(outcomes)
        updates = sum(outcome.updates.get(name, torch.zeros(())) for outcome in outcomes) / len(outcomes)
        weight = outcomes[0].tensors[name]
        epsilon = 2.0**-8 if weight.dtype == torch.bfloat16 else 2.0**-22
        path = max(outcome.paths.get(name, 0.0) for outcome in outcomes)
        bound = epsilon * rounds * (float(weight.abs().max()) + path) + (0.1 * path if is_lossy else 0.0)
        distance = float((drift - updates).abs().max())
        if distance > bound:
            return "steps are lost", f"{name}: {distance:.3g} of {path:.3g} (rounding explains {bound:.3g})"
    return None


def kept_back(program: Program, outcomes: Sequence[Outcome], exactly: Sequence[Outcome]) -> str | None:
    """Whether what optimizers got in sum differs by more than codes may keep back; both at fixed weights."""
    if any(outcome.status != "done" for outcome in outcomes):
        return None
    part = _KEPT_BACK[program.options.get("codec", "int8")]
    for name, expected in exactly[0].applied.items():
        if exactly[0].tensors[name].dtype == torch.bfloat16:
            continue  # each gradient is rounded, and no residual knows of that
        distance = float((outcomes[0].applied[name] - expected).abs().max())
        bound = part * exactly[0].peaks[name]
        if distance > bound:
            return f"{name}: {distance:.3g} of gradients up to {exactly[0].peaks[name]:.3g} (codes explain {bound:.3g})"
    return None


def difference(got: Sequence[Outcome], expected: Sequence[Outcome], *, exact: bool) -> str | None:
    """The first weight that differs."""
    for rank, (one, other) in enumerate(zip(got, expected, strict=True)):
        if one.status != "done":
            return f"rank {rank}: {one.status} {one.error}"
        for name in one.trainable:
            tensor, wanted = one.tensors[name], other.tensors[name]
            is_alike = _same_bits(tensor, wanted) if exact else torch.allclose(tensor, wanted, rtol=1e-2, atol=1e-3)
            if not is_alike:
                return f"rank {rank}, {name}: {(tensor.double() - wanted.double()).abs().max():.3g}"
    return None


def _same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.shape == other.shape and torch.equal(one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8))


_FAILURES = ("a process died", "stuck", "untyped error", "some ranks succeed", "communication fails")


def _is_partly_told(program: Program) -> bool:
    return program.has(Remake) or not all(optimizer.told for optimizer in program.optimizers)


KNOWN: dict[str, Callable[[Finding], bool]] = {
    "one rank's extra round meets another collective of its peers": _known(*_FAILURES, where=lambda p: p.has(ExtraRound)),
    "decentralized drops the steps of optimizers that it was not told of": _known(
        "steps are lost", where=lambda p: p.algorithm == "decentralized" and _is_partly_told(p)
    ),
    "async loses a correction if a consensus finds other weights in the model's place": _known(
        "steps are lost", where=lambda p: p.algorithm == "async" and any(getattr(o, "ema", False) for o in p.operations)
    ),
    "error feedback is lost for optimizers that wrap was not told of": _known(
        "error feedback loses", where=lambda p: p.has_feedback and _is_partly_told(p)
    ),
}
"""Defects that are open: what a finding of each looks like, by the reason. Remove an entry, and what it covers is a failure."""
