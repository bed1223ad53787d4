"""Error feedback through a real DDP and real optimizers: every rank against the specification, to the bit."""

from functools import partial

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

from helpers.models import GivenGradients, assert_gradients, few_kinds
from helpers.ranks import run_ranks
from helpers.tensors import assert_same_bits
from helpers.training import TIMEOUT, Training
from lightning_accel import ByteGrad, Replica
from lightning_accel.reference.bytegrad import bytegrad
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


def with_default_dtypes(rank, world_size):
    steps = [few_kinds(rank, step) for step in range(3)]
    weights = {}
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        torch.set_default_dtype(dtype)
        with Training(GivenGradients(steps[0]), ByteGrad("int4"), SGD, bucket_cap_mb=0.02) as training:
            for gradients in steps:
                training.backward(gradients)
                training.optimizer.step()
            weights[dtype] = [parameter.detach().clone() for parameter in training.model.parameters()]
        torch.set_default_dtype(torch.float32)
        for one, other in zip(weights[dtype], weights[torch.float32], strict=True):
            assert_same_bits(one, other, f"default dtype {dtype}")


def test_residuals_do_not_take_the_default_dtype():
    """Catches residuals, or messages between ranks that meet, of whatever dtype the user's script has made the default."""
    run_ranks(with_default_dtypes, 2)


def skip_steps(rank, world_size):
    steps = [[few_kinds(r, step) for r in range(world_size)] for step in range(6)]
    training = Training(GivenGradients(steps[0][rank]), ByteGrad("sign"), SGD, bucket_cap_mb=0.02)
    residuals = zeros(steps[0], world_size)
    for step, of_ranks in enumerate(steps):
        before = [Residuals([*kept.workers], kept.server) for kept in residuals]
        training.backward(of_ranks[rank])
        expected = bytegrad(of_ranks, "sign", residuals=residuals)
        assert_gradients(training.model, expected, f"step {step}")
        if step in (1, 2, 4):  # as a gradient scaler does
            residuals = before
        else:
            training.optimizer.step()
    training.replica.close()


@pytest.mark.parametrize("world_size", [2, 3])
def test_a_step_that_is_skipped_leaves_residuals_as_they_were(world_size):
    """Catches residuals that are taken up in backward: what a skipped step would have sent is not lost, but undone."""
    run_ranks(skip_steps, world_size)


def take_turns(rank, world_size):
    steps = [[few_kinds(r, step) for r in range(world_size)] for step in range(6)]
    ddp = DistributedDataParallel(GivenGradients(steps[0][rank]), bucket_cap_mb=0.02)
    first, *rest = ddp.parameters()
    optimizers = [torch.optim.SGD([first], lr=1e-3), torch.optim.SGD(rest, lr=1e-3)]
    replica = Replica(ddp, ByteGrad("sign"), optimizers, timeout=TIMEOUT)
    residuals = zeros(steps[0], world_size)
    for step, of_ranks in enumerate(steps):
        before = [Residuals([*kept.workers], kept.server) for kept in residuals]
        ddp.zero_grad()
        ddp(of_ranks[rank]).backward()
        expected = bytegrad(of_ranks, "sign", residuals=residuals)
        assert_gradients(ddp.module, expected, f"step {step}")
        stepping = step % 3  # the first, the others, both
        for k in (0, 1) if stepping == 2 else (stepping,):
            optimizers[k].step()
        if stepping == 0:
            residuals[1:] = before[1:]
        elif stepping == 1:
            residuals[0] = before[0]
    replica.close()


@pytest.mark.parametrize("world_size", [2, 3])
def test_optimizers_that_step_in_turn_keep_their_own_residuals(world_size):
    """Catches residuals taken up for parameters whose code was thrown away: what it carried would be lost for good."""
    run_ranks(take_turns, world_size)


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
