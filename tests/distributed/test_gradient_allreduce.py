"""gradient_allreduce: DDP to the bit where it is flat, its specification to the bit where it is hierarchical."""

import contextlib

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

from helpers.models import GivenGradients, all_kinds, assert_gradients
from helpers.ranks import run_ranks
from helpers.tensors import assert_same_bits
from helpers.training import TIMEOUT, Training
from lightning_accel import GradientAllReduce, Replica
from lightning_accel.reference.gradient_allreduce import gradient_allreduce

STEPS = 20


def network() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Linear(50, 300), torch.nn.BatchNorm1d(300), torch.nn.ReLU(), torch.nn.Linear(300, 120), torch.nn.Linear(120, 3)
    )


def train(rank: int, algorithm: GradientAllReduce | None, micro_batches: int, **options) -> list[torch.Tensor]:
    """Weights after training from one seed; None is plain DDP."""
    ddp = DistributedDataParallel(network(), bucket_cap_mb=0.05, **options)
    optimizer = torch.optim.Adam(ddp.parameters(), lr=1e-2)
    replica = Replica(ddp, algorithm, [optimizer], timeout=TIMEOUT) if algorithm else None
    batches = torch.Generator().manual_seed(100 + rank)
    for _ in range(STEPS):
        for micro_batch in range(micro_batches):
            last = micro_batch == micro_batches - 1
            with contextlib.nullcontext() if last else ddp.no_sync():
                inputs = torch.randn(8, 50, generator=batches)
                ddp(inputs).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    if replica:
        assert replica.rounds == STEPS
        replica.close()
    return [parameter.detach() for parameter in ddp.parameters()]


def compare_training(rank, world_size):
    for micro_batches in (1, 3):
        for gradient_as_bucket_view in (False, True):
            options = {"gradient_as_bucket_view": gradient_as_bucket_view}
            ours = train(rank, GradientAllReduce(), micro_batches, **options)
            theirs = train(rank, None, micro_batches, **options)
            for place, (own, other) in enumerate(zip(ours, theirs, strict=True)):
                assert_same_bits(own, other, f"{micro_batches} micro-batches, {options}, parameter {place}")
    assert not torch.equal(ours[0], network()[0].weight), "nothing was trained"
    return ours


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_training_equals_ddp(world_size):
    """Catches another division, another order of sums, gradients that are reduced in each micro-batch or not at all.

    DDP multiplies by 1/n, or divides by n where gradients are views of buckets: that differs at three ranks.
    """
    ranks = run_ranks(compare_training, world_size)
    for weights in ranks[1:]:
        for own, first in zip(weights, ranks[0], strict=True):
            assert_same_bits(own, first)


def compare_gradients(rank, world_size, device="cpu"):
    gradients = all_kinds(rank)
    for gradient_as_bucket_view in (False, True):
        results = []
        for algorithm in (None, GradientAllReduce(), GradientAllReduce(average=False)):
            options = {"bucket_cap_mb": 1, "gradient_as_bucket_view": gradient_as_bucket_view}
            ddp = DistributedDataParallel(GivenGradients(gradients).to(device), **options)
            replica = Replica(ddp, algorithm, timeout=TIMEOUT) if algorithm else None
            for _ in range(3):
                ddp.zero_grad()
                ddp(gradients).backward()
            if replica:
                replica.close()
            results.append([parameter.grad for parameter in ddp.parameters()])
        for place, (theirs, mean, total) in enumerate(zip(*results, strict=True)):
            what = f"bucket view {gradient_as_bucket_view}, parameter {place}, {theirs.dtype}"
            # NaN + NaN keeps the bits of either one: that much is left to the backend's threads.
            assert_same_bits(mean.nan_to_num(7), theirs.nan_to_num(7), what)
            assert torch.equal(mean.isnan(), theirs.isnan())
            if world_size != 3 and theirs.dtype in (torch.float32, torch.float64):
                # Exact for a power of two, where nothing is subnormal or overflows.
                normal = theirs.isfinite() & total.isfinite() & (theirs.abs() > 1e-30)
                assert_same_bits(torch.where(normal, total, 0.0), torch.where(normal, theirs * world_size, 0.0), what)


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_gradients_equal_ddp_and_the_sum_is_a_multiple(world_size):
    """Catches dtypes that are divided in another precision than DDP's, and an `average` that is ignored."""
    run_ranks(compare_gradients, world_size)


def compare_specification(rank, world_size, device="cpu"):
    of_ranks = [all_kinds(r) for r in range(world_size)]
    for average in (True, False):
        algorithm = GradientAllReduce(average=average)
        with Training(GivenGradients(of_ranks[rank]), algorithm, device=device, bucket_cap_mb=1) as training:
            training.backward(of_ranks[rank])
        expected = gradient_allreduce(of_ranks, average=average)
        for place, (parameter, wanted) in enumerate(zip(training.model.parameters(), expected, strict=True)):
            gradient = parameter.grad.cpu()
            assert torch.equal(gradient.isfinite(), wanted.isfinite()), place
            # n divisions and n - 1 sums, in any order: each rounds by half a unit of at most the sum of magnitudes; a
            # subnormal float16 or bfloat16 rounds by half of its smallest value.
            sizes = torch.stack([gradients[place].double().abs() for gradients in of_ranks]).sum(0)
            sizes = sizes / world_size if average else sizes
            limits = torch.finfo(wanted.dtype)
            bound = 2 * world_size * (limits.eps / 2 * sizes + limits.smallest_normal * limits.eps / 2) * (1 + 2**-6)
            error = (gradient.double() - wanted.double()).abs()
            assert (error <= bound)[wanted.isfinite()].all(), (place, wanted.dtype)


@pytest.mark.parametrize("world_size", [2, 3])
def test_flat_is_the_specified_mean_within_rounding(world_size):
    """Catches what equality with DDP cannot: both wrong in the same way, through a hook that was never called."""
    run_ranks(compare_specification, world_size)


def check_nodes(rank, world_size, nodes, device="cpu"):
    of_ranks = [all_kinds(r) for r in range(world_size)]
    for average in (True, False):
        expected = gradient_allreduce(of_ranks, nodes=nodes, average=average)
        for ddp_options in ({"bucket_cap_mb": 1}, {"bucket_cap_mb": 25, "gradient_as_bucket_view": True}):
            algorithm = GradientAllReduce(hierarchical=True, average=average)
            with Training(GivenGradients(of_ranks[rank]), algorithm, nodes=nodes, device=device, **ddp_options) as training:
                for step in range(3):
                    training.backward(of_ranks[rank])
                    assert_gradients(training.model, expected, f"average {average}, {ddp_options}, step {step}")


@pytest.mark.parametrize("nodes", [((0,),), ((0, 1),), ((0, 1, 2),), ((0,), (1,)), ((0, 1), (2, 3)), ((0, 3), (1, 2))], ids=str)
def test_hierarchical_is_as_specified(nodes):
    """Catches a sum that skips a node or counts one twice, and one that is not in the order of local ranks."""
    run_ranks(check_nodes, sum(len(node) for node in nodes), nodes)


def refuse(rank, world_size):
    with pytest.raises(ValueError, match="equally many ranks on every node: got 1, 2"):
        Training(torch.nn.Linear(3, 3), GradientAllReduce(hierarchical=True), nodes=[[0], [1, 2]])


def test_uneven_nodes_are_refused_on_all_ranks():
    """Catches a refusal on one rank alone, with the others waiting."""
    run_ranks(refuse, 3)
