"""qadam through a real DDP, on gloo: every rank against the specification, in both phases."""

import copy
from functools import partial

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

from helpers.models import GivenGradients
from helpers.ranks import run_ranks
from helpers.tensors import CODECS, assert_same_bits, normal
from helpers.training import TIMEOUT, Training
from lightning_accel import ByteGrad, QAdam, QAdamAlgorithm, Replica, wrap
from lightning_accel.optim import Phase
from lightning_accel.optim.frozen_variance import find_floors
from lightning_accel.reference.bagua_qadam import BaguaQAdam as BaguaSpecification
from lightning_accel.reference.qadam import QAdam as Specification

SIZES = (700, 20_000, 33, 1)


def gradients(world_size: int, step: int) -> list[list[torch.Tensor]]:
    """Of each rank. Multiples of 12 in few bits: for up to four ranks their means are exact in whatever order they are summed."""
    generator = torch.Generator().manual_seed(step)
    return [
        [12 * torch.randint(-50, 51, (numel,), generator=generator).float() * 2.0**-12 for numel in SIZES]
        for _ in range(world_size)
    ]


def training_of(algorithm, groups=None, *, nodes=None, device="cpu", **options):
    """One rank's training; `groups` makes the optimizer's groups of the parameters, `options` are the optimizer's."""
    torch.manual_seed(5)
    model = GivenGradients([torch.zeros(numel) for numel in SIZES])
    for parameter in model.parameters():
        parameter.data.normal_()
    # The same implementation in warm-up as the specification's.
    optimizer = partial(QAdam, foreach=False, **options)
    make = optimizer if groups is None else lambda parameters: optimizer(groups(parameters))
    options_of_ddp = {"bucket_cap_mb": 0.02, "gradient_as_bucket_view": True}
    return Training(model, algorithm, make, nodes=nodes, device=device, **options_of_ddp)


def weights(training):
    """Copies, from which specifications start."""
    return [parameter.detach().clone() for parameter in training.model.parameters()]


def move(specification, device):
    for name in ("parameters", "momenta", "variances"):
        setattr(specification, name, [tensor.to(device) for tensor in getattr(specification, name)])


def check(rank, world_size, codec, error_feedback, weight_decay, decoupled, nodes, device="cpu"):
    arguments = {"lr": 0.01, "warmup_steps": 3, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": weight_decay}
    algorithm = QAdamAlgorithm(codec, error_feedback, hierarchical=nodes is not None)
    training = training_of(algorithm, nodes=nodes, device=device, decoupled_weight_decay=decoupled, **arguments)
    specification = Specification(
        weights(training),
        world_size,
        decoupled=decoupled,
        codec=codec,
        nodes=nodes,
        error_feedback=codec != "none" and error_feedback is None,
        **arguments,
    )
    for step in range(8):
        of_ranks = gradients(world_size, step)
        # Warm-up is torch's Adam, which rounds otherwise on a GPU; from then on every device has the same bits.
        place = device if step < 3 else "cpu"
        move(specification, place)
        training.round(of_ranks[rank])
        specification.step([[gradient.to(place) for gradient in own] for own in of_ranks])
        training.assert_weights(specification.parameters, f"{codec}, step {step}")
        assert training.optimizer.steps == step + 1
        for parameter, momentum in zip(training.ddp.parameters(), specification.momenta, strict=True):
            assert_same_bits(training.optimizer.state[parameter]["exp_avg"], momentum, f"momentum, step {step}")
    assert training.optimizer.phase is Phase.COMPRESSED
    training.replica.close()


def check_codecs(rank, world_size):
    for codec in CODECS if world_size > 1 else ("int8", "none"):
        check(rank, world_size, codec, None, 0.0, False, None)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_both_phases_are_as_specified_on_every_rank(world_size):
    """Catches a dropped gradient at the switch, a moving correction of v, momentum folded twice or with another rank's."""
    run_ranks(check_codecs, world_size)


@pytest.mark.parametrize("decoupled", [False, True])
def test_weight_decay_goes_on_after_warmup(decoupled):
    """Catches weight decay that is lost with the gradient's way into the optimizer."""
    run_ranks(check, 2, "int8", None, 0.1, decoupled, None)


@pytest.mark.parametrize("nodes", [((0, 1), (2, 3)), ((0,), (1,))], ids=str)
def test_by_nodes(nodes):
    run_ranks(check, sum(len(node) for node in nodes), "sign", None, 0.0, False, nodes)


def test_without_error_feedback():
    run_ranks(check, 2, "int4", False, 0.0, False, None)


def check_groups(rank, world_size):
    def groups(parameters):
        first, *rest = parameters
        return [{"params": [first], "lr": 0.1, "betas": (0.5, 0.9), "weight_decay": 0.2}, {"params": rest}]

    training = training_of(QAdamAlgorithm("int8"), groups, lr=0.01, warmup_steps=2)
    own = {"lr": 0.1, "betas": (0.5, 0.9), "weight_decay": 0.2}
    first = Specification(weights(training)[:1], world_size, warmup_steps=2, **own)
    rest = Specification(weights(training)[1:], world_size, warmup_steps=2, lr=0.01)
    scheduler = torch.optim.lr_scheduler.StepLR(training.optimizer, 3, 0.5)
    for step in range(6):
        of_ranks = gradients(world_size, step)
        training.round(of_ranks[rank])
        first.step([own[:1] for own in of_ranks])
        rest.step([own[1:] for own in of_ranks])
        training.assert_weights(first.parameters + rest.parameters, f"step {step}")
        scheduler.step()
        if step in (2, 5):
            first.lr, rest.lr = first.lr * 0.5, rest.lr * 0.5
    training.replica.close()


def test_groups_have_their_own_betas_and_rates():
    """Catches group 0's betas used for all, as in Bagua, and a scheduler that does not reach the kernel."""
    run_ranks(check_groups, 2)


def check_bagua(rank, world_size):
    arguments = {"lr": 0.01, "warmup_steps": 3, "weight_decay": 0.1}
    training = training_of(QAdamAlgorithm("minmax_uint8"), bagua_compat=True, **arguments)
    specification = BaguaSpecification(weights(training), world_size, codec="minmax_uint8", error_feedback=False, **arguments)
    right = Specification(weights(training), world_size, codec="minmax_uint8", **arguments)
    for step in range(7):
        of_ranks = gradients(world_size, step)
        training.round(of_ranks[rank])
        specification.step(of_ranks)
        right.step(of_ranks)
        for parameter, wanted, other in zip(training.ddp.parameters(), specification.parameters, right.parameters, strict=True):
            assert torch.allclose(parameter, wanted, rtol=0, atol=1e-6), step
            assert step < 2 or len(other) < 700 or not torch.allclose(parameter, other, rtol=0, atol=1e-4)
    training.replica.close()


def test_bagua_compat_does_as_bagua_does():
    run_ranks(check_bagua, 2)


def accumulate(rank, world_size):
    training = training_of(QAdamAlgorithm("sign"), lr=0.01, warmup_steps=2)
    specification = Specification(weights(training), world_size, lr=0.01, warmup_steps=2, codec="sign")
    for step in range(6):
        parts = [gradients(world_size, 3 * step + k) for k in range(3)]
        training.optimizer.zero_grad(set_to_none=step % 2 == 0)
        for k, part in enumerate(parts):
            training.micro_batch(part[rank], last=k == 2)
        training.optimizer.step()
        sums = [[sum(tensors) for tensors in zip(*(part[r] for part in parts), strict=True)] for r in range(world_size)]
        specification.step(sums)
        training.assert_weights(specification.parameters, f"step {step}")
    training.replica.close()


def test_accumulated_gradients_fold_once():
    """Catches momentum that decays once a micro-batch."""
    run_ranks(accumulate, 2)


def normal_gradients(world_size, number):
    """Of each rank: their sum depends on the order."""
    return [
        [normal(numel, torch.float32, seed=100 * number + 10 * r + k) for k, numel in enumerate(SIZES)] for r in range(world_size)
    ]


def synchronise_several_times(rank, world_size, codec):
    arguments = {"lr": 0.01, "warmup_steps": 3, "weight_decay": 0.1}
    training = training_of(QAdamAlgorithm(codec), **arguments)
    specification = Specification(weights(training), world_size, codec=codec, **arguments)
    for step, count in enumerate((1, 3, 2, 1, 3, 2, 1, 4, 1)):
        backwards = [normal_gradients(world_size, 10 * step + k) for k in range(count)]
        training.optimizer.zero_grad(set_to_none=step % 2 == 0)
        if step == 6:  # a message that is thrown away
            training.micro_batch(normal_gradients(world_size, 99)[rank])
            training.ddp.zero_grad(set_to_none=False)
        for k, of_ranks in enumerate(backwards):
            training.micro_batch(of_ranks[rank], last=(step, k) != (7, 2))
        training.optimizer.step()
        if step == 7:  # the third was not synchronised: the fourth carries both
            both = [
                [one + other for one, other in zip(*owns, strict=True)] for owns in zip(backwards[2], backwards[3], strict=True)
            ]
            backwards = [*backwards[:2], both]
        specification.step(*backwards)
        for parameter, momentum in zip(training.ddp.parameters(), specification.momenta, strict=True):
            assert torch.allclose(
                training.optimizer.state[parameter]["exp_avg"], momentum, rtol=0, atol=1e-6 if step < 7 else 0.02
            )
        if step < 7:
            training.assert_weights(specification.parameters, f"{codec}, step {step}")
    training.replica.close()


@pytest.mark.parametrize(("world_size", "codec"), [(2, "int8"), (2, "sign"), (3, "int4")])
def test_gradients_of_several_backwards_fold_as_one(world_size, codec):
    """Catches gradients added to momentum, momentum or weight decay folded in twice, and residuals added once a backward."""
    run_ranks(synchronise_several_times, world_size, codec)


def take_turns(rank, world_size, views):
    model = GivenGradients([torch.ones(700), torch.ones(3000)])
    optimizers = [QAdam([parameter], lr=0.01, warmup_steps=2, foreach=False) for parameter in model.parameters()]
    specifications = [
        Specification([parameter.detach().clone()], world_size, lr=0.01, warmup_steps=2, codec="int4")
        for parameter in model.parameters()
    ]
    options = {"codec": "int4", "find_unused_parameters": True, "gradient_as_bucket_view": views}
    with wrap(model, optimizers, "qadam", **options) as ddp:
        for step in range(7):
            for turn, (optimizer, specification) in enumerate(zip(optimizers, specifications, strict=True)):
                backwards = []
                for parameter, other in zip(model.parameters(), range(2), strict=True):
                    parameter.requires_grad_(other == turn)
                optimizer.zero_grad(set_to_none=step % 2 == 0)
                for k in range(1 + step % 2):
                    numel = (700, 3000)[turn]
                    backwards.append([[normal(numel, torch.float32, seed=100 * step + 10 * r + k)] for r in range(world_size)])
                    own = backwards[-1][rank][0]
                    ddp([None if place != turn else own for place in range(2)]).backward()
                optimizer.step()
                specification.step(*backwards)
                for parameter in model.parameters():
                    parameter.requires_grad_(True)
                weight = list(model.parameters())[turn]
                assert_same_bits(weight, specification.parameters[0], f"views {views}, step {step}, turn {turn}")


@pytest.mark.parametrize("views", [False, True])
def test_optimizers_take_turns_as_in_a_gan(views):
    """Catches momentum that is left in a toggled parameter's `.grad` and folded in as if it were a gradient, or refused."""
    run_ranks(take_turns, 2, views)


def forget_to_zero(rank, world_size, set_to_none):
    training = training_of(QAdamAlgorithm("int8"), warmup_steps=1)
    for step in range(2):
        training.optimizer.zero_grad(set_to_none=set_to_none)
        training.micro_batch(gradients(world_size, step)[rank])
        training.optimizer.step()
    with pytest.raises(RuntimeError, match=r"call optimizer\.zero_grad"):
        training.micro_batch(gradients(world_size, 2)[rank])
    training.replica.close()


@pytest.mark.parametrize("set_to_none", [False, True])
def test_a_backward_onto_the_momentum_of_a_step_is_refused(set_to_none):
    """Catches gradients that are added to momentum, in silence."""
    run_ranks(forget_to_zero, 2, set_to_none)


def zero_in_every_way(rank, world_size):
    training = training_of(QAdamAlgorithm("int8"), warmup_steps=1)
    training.round(gradients(world_size, 0)[rank])
    own = gradients(world_size, 1)[rank]
    for zero in (
        training.optimizer.zero_grad,
        training.ddp.zero_grad,
        lambda: training.optimizer.zero_grad(set_to_none=False),
        lambda: training.ddp.zero_grad(set_to_none=False),
    ):
        zero()
        training.ddp(own).backward()
        zero()  # a batch that is thrown away: no step
        training.ddp(own).backward()
        training.optimizer.step()
    training.replica.close()


def test_gradients_may_be_zeroed_in_every_way():
    """Catches a refusal of what is right."""
    run_ranks(zero_in_every_way, 2)


def skip(rank, world_size):
    training = training_of(QAdamAlgorithm("sign"), lr=0.01, warmup_steps=2)
    specification = Specification(weights(training), world_size, lr=0.01, warmup_steps=2, codec="sign")
    for step in range(7):
        of_ranks = gradients(world_size, step)
        if step in (1, 4):  # a step that is not made, in each phase
            training.backward(of_ranks[rank])
            continue
        training.round(of_ranks[rank])
        specification.step(of_ranks)
        training.assert_weights(specification.parameters, f"step {step}")
    training.replica.close()


def test_a_step_that_is_not_made_changes_nothing():
    """Catches momentum or residuals taken up in backward, and a phase that is counted in batches."""
    run_ranks(skip, 2)


def skip_on_one_rank(rank, world_size):
    training = training_of(QAdamAlgorithm("int8"), warmup_steps=4)
    phases = []
    for step in range(9):
        own = gradients(world_size, step)[rank]
        training.backward(own)
        phases.append(training.optimizer.phase is Phase.COMPRESSED)
        if not (rank == 1 and step == 2):
            training.optimizer.step()
    training.replica.close()
    return phases


def test_all_ranks_change_phase_together():
    """Catches a rank that goes on to compress while another, whose scaler skipped a step, still waits in an all_reduce."""
    assert run_ranks(skip_on_one_rank, 2) == [[False] * 5 + [True] * 4] * 2


def freeze_by_itself(rank, world_size):
    training = training_of(QAdamAlgorithm("int8"), betas=(0.5, 0.9), warmup_steps="auto")
    frozen = []
    for step in range(95):
        own = gradients(world_size, step)[rank]
        scale = 4 - min(step // 10, 3)  # the variance settles after that
        training.round([scale * gradient for gradient in own])
        frozen.append(training.optimizer.param_groups[0]["frozen_step"])
    state = training.replica.state_dict()
    training.replica.close()
    return next(step for step in frozen if step), state["algorithm"]["due_step"]


def test_warmup_may_end_by_itself():
    """Catches a variance that is frozen while it still changes, or before two intervals of 1/(1 - beta2) = 10 steps."""
    for frozen_step, _ in run_ranks(freeze_by_itself, 2):
        assert frozen_step == 90


def freeze_at_the_floor(rank, world_size):
    training = training_of(QAdamAlgorithm("int8"), betas=(0.5, 0.9), warmup_steps="auto")
    for _ in range(30):
        training.round(gradients(world_size, 0)[rank])
    training.replica.close()
    return training.optimizer.param_groups[0]["frozen_step"]


def test_warmup_ends_after_two_intervals_at_the_earliest():
    assert run_ranks(freeze_at_the_floor, 2) == [20, 20]


def resume(rank, world_size, stop):
    arguments = {"lr": 0.01, "warmup_steps": 4}
    training = training_of(QAdamAlgorithm("sign"), **arguments)
    for step in range(stop):
        training.round(gradients(world_size, step)[rank])
    saved = (
        copy.deepcopy(training.optimizer.state_dict()),
        training.replica.state_dict(),
        training.replica.algorithm.rank_state_dict(),
    )
    again = training_of(QAdamAlgorithm("sign"), **arguments)
    for old, new in zip(training.ddp.parameters(), again.ddp.parameters(), strict=True):
        new.data.copy_(old.data)
    again.optimizer.load_state_dict(saved[0])
    again.replica.load_state_dict(saved[1])
    again.replica.algorithm.load_rank_state_dict(saved[2])
    for step in range(stop, 9):
        for each in (training, again):
            each.round(gradients(world_size, step)[rank])
        again.assert_weights([parameter.data for parameter in training.ddp.parameters()], f"step {step}")
    training.replica.close()
    again.replica.close()


@pytest.mark.parametrize("stop", [2, 4, 6])
def test_resumed_in_either_phase(stop):
    """Catches a warm-up that starts again, a second freeze, and lost residuals."""
    run_ranks(resume, 2, stop)


def misuse(rank, world_size):
    linear = torch.nn.Linear(2, 2)
    ddp = DistributedDataParallel(linear)
    with pytest.raises(ValueError, match=r"needs lightning_accel.QAdam as every optimizer .*: got SGD"):
        Replica(ddp, QAdamAlgorithm(), [torch.optim.SGD(linear.parameters(), lr=1)], timeout=TIMEOUT)
    halves = [QAdam([linear.weight], warmup_steps=3), QAdam([linear.bias], warmup_steps=4)]
    with pytest.raises(ValueError, match="got no optimizer"):
        Replica(DistributedDataParallel(torch.nn.Linear(2, 2)), QAdamAlgorithm(), timeout=TIMEOUT).attach_optimizers([])
    with pytest.raises(ValueError, match="need the same warmup_steps"):
        Replica(DistributedDataParallel(torch.nn.Linear(2, 2)), QAdamAlgorithm(), halves, timeout=TIMEOUT)
    ddp = DistributedDataParallel(torch.nn.Linear(2, 2))
    replica = Replica(ddp, QAdamAlgorithm(), timeout=TIMEOUT)
    with pytest.raises(RuntimeError, match="knows no optimizer"):
        ddp(torch.ones(1, 2))
    replica.close()


def test_misuse_is_refused_on_all_ranks():
    run_ranks(misuse, 2)


def two_optimizers(rank, world_size):
    torch.manual_seed(1)
    model = torch.nn.Sequential(torch.nn.Linear(6, 6), torch.nn.Linear(6, 1))
    optimizers = [QAdam(layer.parameters(), lr=0.05, warmup_steps=5) for layer in model]
    inputs = torch.randn(16, 6) + rank
    with wrap(model, optimizers, "qadam", codec="int4") as ddp:
        losses = []
        for _ in range(40):
            for optimizer in optimizers:
                optimizer.zero_grad()
            loss = (ddp(inputs) - inputs.sum(1, keepdim=True)).square().mean()
            loss.backward()
            for optimizer in optimizers:
                optimizer.step()
            losses.append(loss.item())
    assert all(optimizer.phase is Phase.COMPRESSED for optimizer in optimizers)
    assert losses[-1] < 0.2 * losses[0]
    return [parameter.tolist() for parameter in model.parameters()]


def test_several_optimizers_share_a_phase():
    """Catches buckets that hold parameters of two phases; ranks must end with the same weights."""
    first, second = run_ranks(two_optimizers, 2)
    assert first == second


@pytest.mark.parametrize(("codec", "ratio"), [("int8", 3.97), ("int4", 7.53), ("sign", 29.26)])
def test_bytes_after_warmup_are_as_promised(codec, ratio):
    def steps(rank_result):
        return [after - before for before, after in zip([0, *rank_result], rank_result, strict=False)]

    for of_rank in run_ranks(count_after_warmup, 2, codec):
        warm, _, compressed = steps(of_rank)
        assert warm == 4 * 512 * 400
        assert warm / compressed == pytest.approx(ratio, abs=0.01)


def count_after_warmup(rank, world_size, codec):
    torch.manual_seed(0)
    model = GivenGradients([torch.zeros(512 * 400)])
    optimizer = QAdam(model.parameters(), warmup_steps=1)
    with wrap(model, optimizer, "qadam", codec=codec) as ddp:
        sent = []
        for _ in range(3):
            optimizer.zero_grad()
            ddp([torch.ones(512 * 400)]).backward()
            optimizer.step()
            sent.append(ddp.statistics.sent_bytes)
    return sent


def mixed(rank, world_size):
    torch.manual_seed(2)
    dtypes = (torch.float32, torch.bfloat16, torch.float64)
    model = GivenGradients([torch.zeros(600, dtype=dtype) for dtype in dtypes], frozen=[0])
    optimizer = QAdam([p for p in model.parameters() if p.requires_grad], lr=0.1, warmup_steps=2)
    with wrap(model, optimizer, "qadam", bucket_cap_mb=0.001) as ddp:
        for _ in range(5):
            optimizer.zero_grad()
            ddp([torch.full((600,), 1.0 + rank, dtype=dtype) for dtype in dtypes]).backward()
            optimizer.step()
    # Gradients of one sign move every element by about the learning rate each step.
    assert model.p1.float().mean().item() == pytest.approx(-0.5, rel=0.3)
    assert model.p2.mean().item() == pytest.approx(-0.5, rel=0.3)
    assert (model.p0 == 0).all()
    return [parameter.tolist() for parameter in model.parameters()]


def test_mixed_dtypes_and_frozen_parameters():
    first, second = run_ranks(mixed, 2)
    assert first == second


def test_other_algorithms_do_not_ask_for_qadam():
    assert ByteGrad().keeps_gradients
    assert not QAdamAlgorithm().keeps_gradients


def never_seen(rank, world_size, codec):
    torch.manual_seed(0)
    model = torch.nn.Embedding(40, 32)
    start = model.weight.detach().clone()
    optimizer = QAdam(model.parameters(), lr=0.1, warmup_steps=3)
    with wrap(model, optimizer, "qadam", codec=codec) as ddp:
        for step in range(12):
            optimizer.zero_grad()
            words = torch.arange(rank, 20, 2) if step < 6 else torch.arange(rank, 30, 2)
            ddp(words).square().sum().backward()
            optimizer.step()
    moved = (model.weight.detach() - start).abs().amax(1)
    assert (moved[:20] > 0.1).all()
    assert (moved[30:] == 0).all(), "rows that no gradient has reached drift"
    assert (moved[20:30] > 0).all()
    assert (moved[20:30] < 12 * 0.1 * 7.3).all(), "rows that warm-up has not seen explode"


@pytest.mark.parametrize("codec", ["int8", "int4", "sign", "minmax_uint8"])
def test_rows_never_seen_stay_and_rows_seen_late_learn(codec):
    """Catches noise on zeros, which Adam makes full steps of, and a frozen variance of zero."""
    run_ranks(never_seen, 2, codec)


def poisoned(rank, world_size):
    training = training_of(QAdamAlgorithm("int4"), lr=0.01, warmup_steps=2)
    specification = Specification(weights(training), world_size, lr=0.01, warmup_steps=2, codec="int4")
    for step in range(6):
        of_ranks = gradients(world_size, step)
        if step == 3:
            of_ranks[1][1][5000] = float("nan")
        training.round(of_ranks[rank])
        specification.step(of_ranks)
        training.assert_weights(specification.parameters, f"step {step}")
    training.replica.close()


def test_a_poisoned_block_is_left_as_it_was():
    """Catches a NaN of one rank in all ranks' momenta, weights and residuals."""
    run_ranks(poisoned, 2)


def roll_back(rank, world_size):
    training = training_of(QAdamAlgorithm("int8"), lr=0.01, warmup_steps=6)
    for step in range(5):
        if step == 2:
            saved = copy.deepcopy(training.optimizer.state_dict())
        training.round(gradients(world_size, step)[rank])
    training.optimizer.load_state_dict(saved)
    for step in range(8):
        training.round(gradients(world_size, step)[rank])
    training.replica.close()
    return training.optimizer.param_groups[0]["frozen_step"]


def test_a_state_that_is_loaded_in_between_counts():
    """Catches an end of warm-up that is counted in rounds since the start."""
    assert run_ranks(roll_back, 2) == [6, 6]


def load_other_format(rank, world_size):
    saved = None
    for memory_format in (torch.contiguous_format, torch.channels_last):
        model = torch.nn.Conv2d(3, 4, 3).to(memory_format=memory_format)
        optimizer = QAdam(model.parameters(), warmup_steps=1)
        with wrap(model, optimizer, "qadam") as ddp:
            if saved is not None:
                optimizer.load_state_dict(saved)
            for _ in range(3):
                loss = ddp(torch.ones(2, 3, 5, 5)).sum()
                if saved is not None:
                    assert optimizer.state[model.weight]["exp_avg"].stride() == model.weight.stride()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        saved = copy.deepcopy(optimizer.state_dict())


def test_a_momentum_in_another_memory_format_is_laid_anew_before_backward():
    """Catches one that is laid anew in the background: on a GPU the memory it leaves would be used again while it is copied."""
    run_ranks(load_other_format, 1)


def wait_for_nothing(rank, world_size):
    training = training_of(QAdamAlgorithm("int8"), warmup_steps=1)
    training.round(gradients(world_size, 0)[rank])
    training.round(gradients(world_size, 1)[rank])
    read, plain = [], torch.Tensor.__bool__
    torch.Tensor.__bool__ = lambda tensor: read.append(tensor) or plain(tensor)
    try:
        for step in range(3):
            loss = training.ddp(gradients(world_size, step)[rank])
            training.optimizer.zero_grad()  # after the forward, as Lightning does
            loss.backward()
            training.optimizer.step()
    finally:
        torch.Tensor.__bool__ = plain
    training.replica.close()
    return len(read)


def test_a_step_reads_no_value():
    """Catches a check that makes the training thread wait for the GPU in each step."""
    assert run_ranks(wait_for_nothing, 2) == [0, 0]


def freeze_together(rank, world_size):
    torch.manual_seed(0)
    model = torch.nn.ModuleList([torch.nn.Linear(4, 3), torch.nn.Linear(4, 3)])
    model.forward = model[0].forward  # the other one is not reached in warm-up
    reached, other = (QAdam(module.parameters(), warmup_steps=2) for module in model)
    with wrap(model, [reached, other], "qadam", find_unused_parameters=True) as ddp:
        for step in range(3):
            for optimizer in (reached, other):
                optimizer.zero_grad()
            ddp(torch.full((2, 4), 1.0 + rank + step)).square().sum().backward()
            for optimizer in (reached, other):
                optimizer.step()
    floors = find_floors(reached)
    variances = [other.state[parameter]["exp_avg_sq"] for parameter in model[1].parameters()]
    return [variance.min().item() for variance in variances], [variance.max().item() for variance in variances], len(floors)


def test_a_model_that_no_gradient_has_reached_takes_the_floor_of_another_optimizers():
    """Catches an optimizer that knows its own floors alone: it has none, and training would end where warm-up does."""
    for least, most, count in run_ranks(freeze_together, 2):
        assert count == 2
        assert least == most
        assert len(set(least)) == 1
        assert least[0] > 0
