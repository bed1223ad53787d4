"""Error feedback through a real DDP and real optimizers: every rank against the specification, to the bit."""

import contextlib
from functools import partial
from random import Random

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

from helpers.models import GivenGradients, assert_gradients, few_kinds
from helpers.ranks import run_ranks
from helpers.tensors import assert_same_bits, normal
from helpers.training import TIMEOUT, Training
from lightning_accel import ByteGrad, Replica, wrap
from lightning_accel.reference.bytegrad import Gradients, bytegrad
from lightning_accel.reference.collectives import Residuals

CODECS = ("int4", "sign", "int8", "minmax_uint8", "bf16")


SGD = partial(torch.optim.SGD, lr=1e-3)


def zeros(of_ranks, num_workers: int) -> list[Residuals]:
    return [Residuals.zeros(num_workers, tensor.numel()) for tensor in of_ranks[0]]


def check(rank, world_size, codec, nodes, device="cpu"):
    steps = [[few_kinds(r, step) for r in range(world_size)] for step in range(5)]
    for options in ({"bucket_cap_mb": 25}, {"bucket_cap_mb": 0.02, "gradient_as_bucket_view": True}):
        algorithm = ByteGrad(codec, error_feedback=True, hierarchical=nodes is not None)
        residuals = zeros(steps[0], len(nodes) if nodes else world_size)
        with Training(GivenGradients(steps[0][rank]), algorithm, SGD, nodes=nodes, device=device, **options) as training:
            for step, of_ranks in enumerate(steps):
                training.backward(of_ranks[rank])
                expected = bytegrad(of_ranks, codec, nodes=nodes, residuals=residuals)
                assert_gradients(training.model, expected, f"{codec}, {options}, step {step}")
                training.optimizer.step()


@pytest.mark.parametrize(
    ("world_size", "nodes"), [(2, None), (3, None), (4, None), (4, ((0, 1), (2, 3))), (2, ((0,), (1,)))], ids=str
)
def test_residuals_travel_as_specified(world_size, nodes):
    """Catches residuals by bucket, which DDP rebuilds after the first step, of the wrong rank, or added twice."""
    for codec in CODECS if world_size == 2 else ("sign", "int4"):
        run_ranks(check, world_size, codec, nodes)


OPTIMIZERS = ((0,), (1, 2), (0, 1, 2))
"""Places of each optimizer's parameters: two that share the model, and one of all."""

BOTH = [("zero", 2, True), ("backward", "all")]

SEQUENCES = {
    "skipped by a scaler": [*BOTH, ("step", 2), *BOTH, *BOTH, ("step", 2), *BOTH, ("step", 2)],
    "skipped, and zeroed in place": [*BOTH, ("step", 2), *BOTH, ("zero", 2, False), ("backward", "all"), ("step", 2), *BOTH],
    "four backwards": [*BOTH, *[("backward", "all")] * 3, ("step", 2), *BOTH, ("backward", "all"), ("step", 2), *BOTH],
    "two, and none of them used": [
        *BOTH,
        ("step", 2),
        *BOTH,
        ("backward", "all"),
        *BOTH,
        ("backward", "all"),
        ("step", 2),
        *BOTH,
    ],
    "no_sync after a message": [*BOTH, ("no_sync", "all"), ("backward", "all"), ("step", 2), *BOTH, ("step", 2)],
    "no_sync after a message that was zeroed": [
        *BOTH,
        ("step", 2),
        *BOTH,
        ("zero", 2, False),
        ("no_sync", "all"),
        ("backward", "all"),
    ],
    "never zeroed": [("backward", "all"), ("step", 2)] * 3,
    "optimizers in turn": [*BOTH, ("step", 0), *BOTH, ("step", 1), *BOTH, ("step", 2), *BOTH],
    "toggled": [("zero", 0, True), ("backward", "first"), ("step", 0), ("zero", 1, True), ("backward", "rest"), ("step", 1)] * 3,
    "toggled, two backwards each": [
        *[("zero", 0, True), ("backward", "first"), ("backward", "first"), ("step", 0)],
        *[("zero", 1, True), ("backward", "rest"), ("backward", "rest"), ("step", 1)],
    ]
    * 2,
    "one waits while the other steps": [
        *[("zero", 1, True), ("backward", "rest")],
        *[("zero", 0, True), ("backward", "first"), ("step", 0)],
        *[("backward", "rest"), ("step", 1), ("zero", 1, False), ("backward", "first"), ("step", 1), ("backward", "rest")],
    ],
    "unused on rank 0": [*BOTH, ("step", 2), ("zero", 2, True), ("backward", "some"), ("step", 2), *BOTH, ("step", 2), *BOTH],
}
"""What happens to a model whose gradients are synchronised with error feedback; see `act`."""

USES_ALL = [name for name, sequence in SEQUENCES.items() if {step[1] for step in sequence if step[0] != "step"} <= {"all", 2}]


def at_random(seed: int, uses: tuple[str, ...]) -> list[tuple]:
    """A sequence of 40 acts."""
    random = Random(seed)
    acts = []
    for _ in range(40):
        kind = random.choices(("backward", "no_sync", "zero", "step"), (6, 2, 3, 4))[0]
        if kind == "backward":
            acts.append((kind, random.choice(uses)))
        elif kind == "no_sync":
            use = random.choice(uses[:3])
            # DDP refuses what was used under no_sync, zeroed, and is not used then.
            acts += [(kind, use), ("backward", use)] if len(uses) > 1 else [(kind, use)]
        elif kind == "zero":
            acts.append((kind, random.randrange(3), random.random() < 0.5))
        else:
            acts.append((kind, random.randrange(3)))
    return acts


def gradients_of(use: str, world_size: int, number: int) -> list[list[torch.Tensor | None]]:
    """Gradients of each rank, of each parameter: of all parameters, of the first, of the rest, or of some on rank 0."""
    sizes = (700, 33, 1500)
    of_ranks = [
        [normal(numel, torch.float32, seed=100 * number + 10 * r + k) for k, numel in enumerate(sizes)] for r in range(world_size)
    ]
    for r, own in enumerate(of_ranks):
        for place in range(3):
            if (use == "first" and place) or (use == "rest" and not place) or (use == "some" and place != 1 and r == 0):
                own[place] = None
    return of_ranks


def act(rank, world_size, codec, sequences, views, find_unused_parameters):
    """Runs sequences, one after the other, and compares `.grad` with the specification's after each backward.

    `("backward", use)` and `("no_sync", use)` compute gradients, and toggle what they do not use as Lightning's
    `toggle_optimizer` does; `("zero", optimizer, set_to_none)` and `("step", optimizer)` are an optimizer's.
    """
    like = gradients_of("all", world_size, 0)[0]
    model = GivenGradients(like)
    parameters = list(model.parameters())
    optimizers = [torch.optim.SGD([parameters[place] for place in places], lr=1e-3) for places in OPTIMIZERS]
    expected = Gradients(like, world_size, codec, views=views)
    options = {"gradient_as_bucket_view": views, "find_unused_parameters": find_unused_parameters, "bucket_cap_mb": 0.001}
    ddp = wrap(model, optimizers, "bytegrad", codec=codec, error_feedback=True, **options)
    numbered = [(name, step) for name, sequence in sequences.items() for step in sequence]
    for number, (name, (kind, subject, *rest)) in enumerate(numbered):
        if kind == "zero":
            optimizers[subject].zero_grad(set_to_none=rest[0])
            expected.zero(OPTIMIZERS[subject], set_to_none=rest[0])
        elif kind == "step":
            optimizers[subject].step()
            expected.step(OPTIMIZERS[subject])
        else:
            of_ranks = gradients_of(subject, world_size, number)
            for place, parameter in enumerate(parameters):
                parameter.requires_grad_(subject in ("all", "some") or of_ranks[rank][place] is not None)
            with ddp.no_sync() if kind == "no_sync" else contextlib.nullcontext():
                ddp(of_ranks[rank]).backward()
            expected.backward(of_ranks, synchronised=kind == "backward")
            assert_gradients(model, expected.of_ranks[rank], f"{name}, views {views}, after {numbered[: number + 1][-9:]}")
    ddp.replica.close()


def follow_sequences(rank, world_size, codec, num_random):
    plain = {name: SEQUENCES[name] for name in USES_ALL} | {f"random {k}": at_random(k, ("all",)) for k in range(num_random)}
    uses = ("all", "first", "rest", "some")
    every = SEQUENCES | {f"random with unused {k}": at_random(k, uses) for k in range(num_random)}
    for views in (False, True):
        act(rank, world_size, codec, plain, views, False)
        act(rank, world_size, codec, every, views, True)


@pytest.mark.parametrize(("world_size", "codec"), [(2, "int8"), (2, "sign"), (3, "int4")])
def test_what_optimizers_use_and_what_is_left_add_up(world_size, codec):
    """Catches residuals added once a backward, kept for what was thrown away, or lost for what a toggled optimizer has used."""
    run_ranks(follow_sequences, world_size, codec, 3)


def poison(rank, world_size):
    steps = [[few_kinds(r, step) for r in range(world_size)] for step in range(4)]
    steps[1][1][1][1000] = float("nan")
    training = Training(GivenGradients(steps[0][rank]), ByteGrad("int4"), SGD, bucket_cap_mb=0.02)
    residuals = zeros(steps[0], world_size)
    for step, of_ranks in enumerate(steps):
        training.backward(of_ranks[rank])
        expected = bytegrad(of_ranks, "int4", residuals=residuals)
        assert_gradients(training.model, expected, f"step {step}")
        assert training.model.p1.grad.isnan().sum() == (128 if step == 1 else 0)
        training.optimizer.step()
    training.replica.close()


@pytest.mark.parametrize("world_size", [2, 3])
def test_a_poisoned_block_keeps_its_residual(world_size):
    """Catches a NaN that stays in a residual, and with it in every later gradient."""
    run_ranks(poison, world_size)


def save_and_go_on(rank, world_size):
    steps = [[few_kinds(r, step) for r in range(world_size)] for step in range(6)]
    training = Training(GivenGradients(steps[0][rank]), ByteGrad("sign"), SGD, bucket_cap_mb=0.02)
    for of_ranks in steps[:3]:
        training.backward(of_ranks[rank])
        training.optimizer.step()
    state = training.replica.algorithm.rank_state_dict()
    other = Training(GivenGradients(steps[0][rank]), ByteGrad("sign"), SGD, bucket_cap_mb=25)
    other.replica.algorithm.load_rank_state_dict(state)
    for of_ranks in steps[3:]:
        for each in (training, other):
            each.backward(of_ranks[rank])
            each.optimizer.step()
        for one, two in zip(training.ddp.parameters(), other.ddp.parameters(), strict=True):
            assert_same_bits(one.grad, two.grad)
    smaller = Training(GivenGradients(steps[0][rank][:3]), ByteGrad("sign"), SGD)
    with pytest.raises(ValueError, match=r"worker residuals have .* another model, number of ranks or hierarchy"):
        smaller.replica.algorithm.load_rank_state_dict(state)
    for each in (training, other, smaller):
        each.replica.close()


@pytest.mark.parametrize("world_size", [2, 3])
def test_residuals_are_saved_and_restored(world_size):
    """Catches a resumed run, with other buckets even, that starts from zero residuals."""
    run_ranks(save_and_go_on, world_size)


def count_bytes(rank, world_size, codec):
    numel = 512 * 400
    training = Training(GivenGradients([torch.zeros(numel)]), ByteGrad(codec), SGD)
    for _ in range(3):
        training.backward([torch.ones(numel)])
    statistics = training.replica.statistics
    training.replica.close()
    return statistics.full_precision_bytes / statistics.sent_bytes


@pytest.mark.parametrize(("codec", "ratio"), [("int8", 3.97), ("int4", 7.53), ("sign", 29.26)])
def test_bytes_are_as_promised(codec, ratio):
    """Catches headers or padding that eat the gain: 32 bits against 8.0625, 4.25 and 1.09375."""
    for of_rank in run_ranks(count_bytes, 2, codec):
        assert of_rank == pytest.approx(ratio, abs=0.01)


def warn(rank, world_size):
    ddp = DistributedDataParallel(torch.nn.Linear(2, 2))
    with pytest.warns(UserWarning, match="sign.*qadam") if rank == 0 else pytest.MonkeyPatch.context():
        Replica(ddp, ByteGrad("sign"), timeout=TIMEOUT).close()


def test_sign_on_raw_gradients_warns_once():
    run_ranks(warn, 2)
