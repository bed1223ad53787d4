"""low_precision_decentralized through a real DDP, on gloo: every rank's weights against the specification, to the bit."""

import pytest
import torch

from helpers.ranks import run_ranks
from helpers.tensors import assert_same_bits
from helpers.weights import Simulation, check_estimates, inputs_of, mixed_training, trainable
from lightning_accel import LowPrecisionDecentralized as Options
from lightning_accel.reference.low_precision_decentralized import LowPrecisionDecentralized as Reference

ROUNDS = 7
PAIRS = ((0, 1), (2, 3))


def check(rank, world_size, cases, device="cpu"):
    for options, micro_batches, nodes, rounds in cases:
        what = f"{options}, {micro_batches} micro-batches, nodes {nodes}"
        simulation = Simulation(world_size, device=device)
        training = mixed_training(options, nodes, device=device, gradient_as_bucket_view=True)
        groups = nodes if options.hierarchical else None
        reference = Reference(simulation.weights[0], world_size, options.codec, nodes=groups)
        has_ring = len(reference.nodes) > 1
        for round_ in range(rounds):
            if world_size > 1 and round_ > 0 and round_ % options.communication_interval == 0:
                simulation.set_weights(reference.exchange(simulation.weights))
            for micro_batch in range(micro_batches):
                simulation.backward(round_, micro_batch)
            simulation.step()
            training.round(*(inputs_of(rank, round_, k).to(device) for k in range(micro_batches)))
            training.assert_weights(simulation.weights[rank], f"{what}, round {round_}")
            if round_ == rounds // 2:  # validation
                agreed = reference.consensus(simulation.weights) if world_size > 1 else simulation.weights[0]
                simulation.set_weights([agreed] * world_size)
                training.replica.consensus()
                training.assert_weights(agreed, f"{what}, consensus")
        if has_ring:
            check_estimates(training)
        check_consensus(training, simulation, what)
        training.replica.close()


def check_consensus(training, simulation, what):
    """The ranks' weights are apart, and then they are not."""
    assert len(simulation.models) == 1 or (torch.stack([w[0] for w in simulation.weights]).std(0, correction=0) > 0).any()
    training.replica.consensus()
    mine = torch.cat([tensor.double().flatten() for tensor in trainable(training.model)])
    assert mine.isfinite().all()
    lowest, highest = mine.clone(), mine.clone()
    torch.distributed.all_reduce(lowest, torch.distributed.ReduceOp.MIN)
    torch.distributed.all_reduce(highest, torch.distributed.ReduceOp.MAX)
    assert torch.equal(lowest, highest), f"{what}: spread after consensus"


@pytest.mark.parametrize(
    ("world_size", "cases"),
    [
        (1, [(Options(), 1, None, 3)]),
        (
            2,
            [
                (Options(), 1, None, 50),
                (Options("minmax_uint8", 3), 2, None, ROUNDS),
                (Options("none"), 1, None, ROUNDS),
                (Options(hierarchical=True), 1, [[0], [1]], ROUNDS),
            ],
        ),
        (
            3,
            [
                (Options(), 1, None, 50),
                (Options("bf16", 3), 2, None, ROUNDS),
                (Options("fp16"), 1, None, ROUNDS),
                (Options("int4"), 1, None, 4),
                (Options("sign"), 1, None, 4),
            ],
        ),
        (
            4,
            [
                (Options(), 1, None, ROUNDS),
                (Options(hierarchical=False, communication_interval=3), 2, PAIRS, ROUNDS),
                (Options(hierarchical="auto"), 1, PAIRS, 20),
                (Options(hierarchical=True), 1, [range(4)], ROUNDS),
            ],
        ),
    ],
)
def test_every_rank_holds_the_specified_weights(world_size, cases):
    """Catches replicas that drift apart by a bit, neighbours on the wrong side, a message added twice where both neighbours
    are one rank, blocks that cross parameters, float64 that went through float32, and half weights that never move."""
    run_ranks(check, world_size, cases)


def agreement(rank, world_size):
    """Without gradients the ring's weights meet in their mean, which the exchange keeps but for rounding."""
    training = mixed_training(Options())
    algorithm = training.replica.algorithm
    algorithm.before_forward()
    weights = trainable(training.model)
    weights[0].add_(rank)
    before = float(weights[0].double().mean())
    spreads = []
    for _ in range(40):
        algorithm.before_step()
        algorithm.before_forward()
        of_ranks = [torch.empty_like(weights[0]) for _ in range(world_size)]
        torch.distributed.all_gather(of_ranks, weights[0])
        spreads.append(float((torch.stack(of_ranks).amax(0) - torch.stack(of_ranks).amin(0)).max()))
    mean = float(torch.stack(of_ranks).double().mean()) - before + rank
    assert mean == pytest.approx((world_size - 1) / 2, abs=0.02)
    training.replica.close()
    return spreads


@pytest.mark.parametrize("world_size", [3, 4])
def test_without_gradients_all_agree(world_size):
    """Catches weights of the neighbours that do not add up to 1: the ring would not come to rest, or not at the mean."""
    for spreads in run_ranks(agreement, world_size):
        assert spreads[0] > 0.3
        assert spreads[-1] < 0.01 * spreads[0]


def resumed(rank, world_size):
    """The same weights and the counter are all that a checkpoint needs: replicas follow from them."""
    ended = []
    for is_resumed in (False, True):
        training = mixed_training(Options(communication_interval=2))
        for round_ in range(5):
            training.round(inputs_of(rank, round_))
        training.replica.consensus()
        if is_resumed:
            state, model = training.replica.state_dict(), {k: v.clone() for k, v in training.model.state_dict().items()}
            momentum = training.optimizer.state_dict()
            training.replica.close()
            training = mixed_training(Options(communication_interval=2))
            training.model.load_state_dict(model)
            training.optimizer.load_state_dict(momentum)
            training.replica.load_state_dict(state)
            assert training.replica.algorithm.rounds == 5
        for round_ in range(5, 9):
            training.round(inputs_of(rank, round_))
        check_estimates(training)
        ended.append([tensor.clone() for tensor in trainable(training.model)])
        training.replica.close()
    for uninterrupted, again in zip(*ended, strict=True):
        assert_same_bits(again, uninterrupted, "after resume")


def test_a_resumed_ring_goes_on_with_the_same_bits():
    """Catches replicas that start from something else than the checkpoint's weights, and an interval that begins anew."""
    run_ranks(resumed, 3)
