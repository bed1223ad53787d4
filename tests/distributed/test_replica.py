"""When the hooks of an algorithm are called, in plain PyTorch: told by an algorithm that writes down what it is asked."""

import contextlib
import gc
import weakref
from dataclasses import dataclass
from datetime import timedelta

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

from helpers.ranks import own_threads, run_ranks
from lightning_accel import Algorithm, BoundAlgorithm, ByteGrad, GradientAllReduce, Replica, register_algorithm

TIMEOUT = timedelta(seconds=30)


class _Recorder(BoundAlgorithm):
    """Keeps local gradients."""

    def __init__(self, context):
        super().__init__(context)
        self.events = []
        self.at_step = lambda: None
        self.at_forward = lambda: None
        self.factor = 1

    def take(self) -> list[str]:
        events, self.events = self.events, []
        return events

    def reduce_gradients(self, bucket, label):
        self.events.append(f"reduce {label}")
        future = torch.futures.Future()
        future.set_result(bucket.buffer() * self.factor)
        return future

    def before_forward(self):
        self.events.append("before_forward")
        self.at_forward()

    def before_step(self):
        self.events.append("before_step")
        self.at_step()

    def consensus(self):
        self.events.append("consensus")

    def pause(self):
        self.events.append("pause")

    def resume(self):
        self.events.append("resume")

    def state_dict(self):
        return {"factor": self.factor}

    def load_state_dict(self, state):
        self.factor = state["factor"]

    def teardown(self):
        self.events.append("teardown")


@dataclass(frozen=True)
class Recording(Algorithm):
    def bind(self, context):
        return _Recorder(context)


ONE_BUCKET = "reduce bucket 0"
ROUND = ["before_forward", ONE_BUCKET, "before_step"]


def setup(optimizers: int = 1, **options):
    """A replica of a small network with a bucket, and optimizers that each have a part of it."""
    register_algorithm("recording")(Recording)
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
    ddp = DistributedDataParallel(model, **options)
    parts = [model.parameters()] if optimizers == 1 else [model[0].parameters(), model[1].parameters()]
    made = [torch.optim.SGD(part, lr=0.1) for part in parts]
    replica = Replica(ddp, Recording(), made, timeout=TIMEOUT)
    return ddp, replica, replica.algorithm, made


def data(rank: int) -> torch.Tensor:
    return torch.full((2, 4), 1.0 + rank)


def plain_steps(rank, world_size):
    for options in ({}, {"gradient_as_bucket_view": True}, {"static_graph": True}, {"find_unused_parameters": True}):
        ddp, replica, recorder, (optimizer,) = setup(**options)
        for step in range(4):
            ddp(data(rank)).sum().backward()
            assert replica.rounds == step
            optimizer.step()
            optimizer.zero_grad()
            assert recorder.take() == ROUND, f"{options}, step {step}"
            assert replica.rounds == step + 1
        replica.close()
        assert recorder.take() == ["teardown"]


def test_a_step_is_a_round():
    """Catches a moment that is missing, doubled, or in another place, on each of DDP's paths."""
    run_ranks(plain_steps, 2)


def accumulation(rank, world_size):
    ddp, replica, recorder, (optimizer,) = setup()
    for micro_batches in (3, 1, 2):
        for micro_batch in range(micro_batches):
            last = micro_batch == micro_batches - 1
            with contextlib.nullcontext() if last else ddp.no_sync():
                ddp(data(rank)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        assert recorder.take() == ROUND
    # A step while all micro-batches were in no_sync: still a round, with nothing to reduce.
    with ddp.no_sync():
        ddp(data(rank)).sum().backward()
    optimizer.step()
    assert recorder.take() == ["before_forward", "before_step"]
    assert replica.rounds == 4
    replica.close()


def test_accumulated_micro_batches_are_one_round():
    """Catches rounds that count micro-batches: intervals would shrink with accumulation."""
    run_ranks(accumulation, 2)


def two_optimizers(rank, world_size):
    ddp, replica, recorder, (first, second) = setup(optimizers=2)
    # One forward, two steps.
    ddp(data(rank)).sum().backward()
    first.step()
    second.step()
    assert recorder.take() == ROUND
    first.step()
    assert recorder.take() == []
    assert replica.rounds == 1
    # In turns, as in a GAN.
    for optimizer in (first, second, first):
        ddp.zero_grad()
        ddp(data(rank)).sum().backward()
        optimizer.step()
        assert recorder.take() == ROUND
    assert replica.rounds == 4
    # Two forwards before a backward, as contrastive losses have.
    (ddp(data(rank)).sum() + ddp(data(rank) * 2).sum()).backward()
    first.step()
    assert recorder.take() == ROUND
    replica.close()


def test_a_second_optimizer_sees_nothing_new():
    """Catches rounds that count optimizer steps."""
    run_ranks(two_optimizers, 2)


class _TwoHeads(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)

    def forward(self, inputs):
        return self.first(inputs).sum(), self.second(inputs).sum()


def late_backward(rank, world_size):
    register_algorithm("recording")(Recording)
    ddp = DistributedDataParallel(_TwoHeads())
    first, second = (torch.optim.SGD(head.parameters(), lr=0.1) for head in (ddp.module.first, ddp.module.second))
    replica = Replica(ddp, Recording(), [first, second], timeout=TIMEOUT)
    recorder = replica.algorithm
    one, other = ddp(data(rank))
    one.backward()
    first.step()
    other.backward()  # completes the bucket that both heads are in
    second.step()
    assert recorder.take() == ["before_forward", "before_step", ONE_BUCKET]
    with ddp.no_sync():
        sum(ddp(data(rank))).backward()
    sum(ddp(data(rank))).backward()
    first.step()
    assert recorder.take() == ROUND
    assert replica.rounds == 2
    replica.close()


def test_gradients_reduced_after_the_step_leave_the_next_round_alone():
    """Catches reduced gradients that are remembered past their round: the next one would end at its first micro-batch."""
    run_ranks(late_backward, 2)


def evaluation(rank, world_size):
    ddp, replica, recorder, (optimizer,) = setup()
    with torch.no_grad():
        ddp(data(rank))
    assert recorder.take() == []
    with ddp.no_sync():
        ddp(data(rank)).sum().backward()
    assert recorder.take() == ["before_forward"]
    # Validation between two micro-batches, which leaves the wrapper in eval mode as Lightning's does.
    ddp.eval()
    with torch.no_grad():
        ddp(data(rank))
    ddp.module.train()
    ddp(data(rank)).sum().backward()
    with torch.inference_mode():
        ddp(data(rank))
    assert recorder.take() == [ONE_BUCKET]
    optimizer.step()
    assert recorder.take() == ["before_step"]
    with torch.no_grad():
        ddp(data(rank))
    optimizer.step()
    assert recorder.take() == []
    # The wrapper's flag says eval, gradients are on: this is training.
    ddp(data(rank)).sum().backward()
    optimizer.step()
    assert recorder.take() == ROUND
    assert replica.rounds == 2
    replica.close()


def test_evaluation_is_no_round():
    """Catches rounds that are told by `training`, which stays False after Lightning's validation."""
    run_ranks(evaluation, 2)


def skipped_step(rank, world_size):
    ddp, replica, recorder, (optimizer,) = setup()
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    before = [parameter.detach().clone() for parameter in ddp.parameters()]
    events = []
    for step in range(4):
        inputs = data(rank)
        if rank == 1 and step in (0, 2):
            inputs[0, 0] = float("inf")
        optimizer.zero_grad()
        scaler.scale(ddp(inputs).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
        events.append(recorder.take())
        if step == 0:
            changed = [not torch.equal(old, new) for old, new in zip(before, ddp.parameters(), strict=True)]
            assert any(changed) == (rank == 0), "the test's own premise: rank 1 skips the step, rank 0 does not"
    assert replica.rounds == 4
    replica.close()
    return [event for of_step in events for event in of_step]


def test_a_step_skipped_on_one_rank_only_changes_nothing_that_peers_see():
    """Catches hooks that depend on the optimizer: rank 0 would exchange weights while rank 1 does not, and hang."""
    first, second = run_ranks(skipped_step, 2)
    assert first == second == ROUND * 4


def skipped_before_consensus(rank, world_size):
    ddp, replica, _, (optimizer,) = setup()
    for _ in range(2):
        ddp(data(rank)).sum().backward()
        if rank == 1:  # a scaler skips on rank 0
            optimizer.step()
    replica.consensus()
    assert replica.rounds == 2, "a checkpoint would count one round less"
    ddp(data(rank)).sum().backward()
    replica.consensus()
    optimizer.step()
    assert replica.rounds == 3, "a round that a consensus has ended must not end twice"
    with ddp.no_sync():
        ddp(data(rank)).sum().backward()
    replica.consensus()
    assert replica.rounds == 3, "a micro-batch is no round"
    ddp(data(rank)).sum().backward()
    optimizer.step()
    assert replica.rounds == 4
    replica.close()
    return True


def test_a_consensus_ends_a_round_whose_step_was_skipped():
    """Catches counters that a checkpoint takes one round too early, on the rank that skipped, and micro-batches as rounds."""
    assert run_ranks(skipped_before_consensus, 2) == [True, True]


class _Failing(torch.autograd.Function):
    """An error in backward, where it is asked for."""

    @staticmethod
    def forward(context, inputs, fails):
        context.fails = fails
        return inputs.clone()

    @staticmethod
    def backward(context, gradient):
        if context.fails:
            raise ValueError("no gradient today")
        return gradient, None


def failed_backward(rank, world_size):
    ddp, replica, recorder, (optimizer,) = setup()
    for fails in (False, True, False, True, True, False):
        optimizer.zero_grad()
        loss = _Failing.apply(ddp(data(rank)), fails).sum()
        if fails:
            with pytest.raises(ValueError, match="no gradient today"):
                loss.backward()
            continue
        loss.backward()
        optimizer.step()
    # A failed backward leaves its round open: the next forward goes on with it.
    assert recorder.take() == ROUND * 3
    assert replica.rounds == 3
    replica.close()


def test_a_failed_backward_leaves_the_replica_usable():
    """Catches a round that is lost or counted twice when a backward did not get as far as its buckets."""
    run_ranks(failed_backward, 2)


def weights(rank, world_size):
    ddp, replica, recorder, (optimizer,) = setup()
    parameters = list(ddp.parameters())

    def set_to(value):
        with torch.no_grad():
            for parameter in parameters:
                parameter.fill_(value)

    # Weights set before the step are what the optimizer steps from, with gradients taken at the old weights.
    ddp(data(rank)).sum().backward()
    gradients = [parameter.grad.clone() for parameter in parameters]

    def at_step():
        for parameter, gradient in zip(parameters, gradients, strict=True):
            assert torch.equal(parameter.grad, gradient), "the gradient is complete before the step"
        set_to(5.0)

    recorder.at_step = at_step
    optimizer.step()
    for parameter, gradient in zip(parameters, gradients, strict=True):
        assert torch.equal(parameter, torch.full_like(parameter, 5.0).add(gradient, alpha=-0.1))

    # Weights set before the forward are what this very forward sees.
    recorder.at_forward = lambda: set_to(0.0)
    assert (ddp(data(rank)) == 0).all()
    replica.close()


def test_weights_may_change_at_both_moments():
    """Catches a moment after the optimizer, or after the forward has read the weights."""
    run_ranks(weights, 2)


def results(rank, world_size):
    ddp, replica, recorder, (optimizer,) = setup()
    ddp(data(rank)).sum().backward()
    local = [parameter.grad.clone() for parameter in ddp.parameters()]
    recorder.factor = 2
    optimizer.zero_grad()
    ddp(data(rank)).sum().backward()
    for parameter, gradient in zip(ddp.parameters(), local, strict=True):
        assert torch.equal(parameter.grad, gradient * 2)

    recorder.take()
    replica.consensus()
    replica.pause()
    replica.resume()
    # No backward had a step: the second forward ended the first one's round, and the consensus the second one's.
    assert recorder.take() == ["before_step", "consensus", "pause", "resume"]
    assert replica.state_dict() == {"rounds": 2, "algorithm": {"factor": 2}}
    ddp(data(rank)).sum().backward()
    recorder.take()
    replica.load_state_dict({"rounds": 41, "algorithm": {"factor": 3}})
    assert (replica.rounds, recorder.factor) == (41, 3)
    # What was loaded stood between two rounds: the one that was open here is no more.
    optimizer.step()
    assert recorder.take() == []
    ddp(data(rank)).sum().backward()
    optimizer.step()
    assert recorder.take() == ROUND
    assert replica.rounds == 42
    replica.close()


def test_the_future_is_the_gradient_and_the_rest_is_passed_on():
    """Catches a hook whose result is dropped, and counters that start anew after a resume."""
    run_ranks(results, 2)


def closing(rank, world_size):
    torch.manual_seed(0)
    ddp = DistributedDataParallel(torch.nn.Linear(4, 4))
    optimizer = torch.optim.SGD(ddp.parameters(), lr=0.1)
    replica = Replica(ddp, ByteGrad(), [optimizer], timeout=TIMEOUT)
    ddp(data(rank)).sum().backward()
    optimizer.step()
    assert own_threads()
    replica.close()
    assert not own_threads()
    rounds = replica.rounds
    replica.close()
    replica.close()
    # The hook stays for DDP's life; gradients are local from here on.
    ddp.zero_grad()
    ddp(data(rank)).sum().backward()
    assert torch.equal(ddp.module.weight.grad, torch.full((4, 4), 2.0 * (1 + rank)))
    optimizer.step()
    assert replica.rounds == rounds
    with pytest.raises(RuntimeError, match=r"(?i)hook"):
        Replica(ddp, ByteGrad(), timeout=TIMEOUT)

    # Nor does DDP keep a replica alive.
    other = DistributedDataParallel(torch.nn.Linear(4, 4))
    dropped = Replica(other, ByteGrad(), timeout=TIMEOUT)
    dropped.close()
    reference = weakref.ref(dropped)
    del dropped
    gc.collect()
    assert reference() is None
    other(data(rank)).sum().backward()
    assert torch.equal(other.module.weight.grad, torch.full((4, 4), 2.0 * (1 + rank)))


def test_close_ends_everything_and_may_be_repeated():
    """Catches a thread that stays, a hook that touches closed groups, and a second close that hangs."""
    run_ranks(closing, 2)


def joining(rank, world_size):
    ddp, replica, _, _ = setup()
    with pytest.raises(RuntimeError, match="cannot be used with an algorithm"), ddp.join(enable=True):
        ddp(data(rank)).sum().backward()
    replica.close()


def test_join_is_refused():
    """Catches a rank without data that answers DDP's all_reduces while the others speak the algorithm's."""
    run_ranks(joining, 1)


def foreign_optimizer(rank, world_size):
    """Optimizers that were not named, and a strategy that calls the moment itself."""
    ddp, replica, recorder, (optimizer,) = setup()
    other = torch.optim.SGD(ddp.parameters(), lr=0.1)
    ddp(data(rank)).sum().backward()
    other.step()
    assert recorder.take() == ["before_forward", ONE_BUCKET]
    replica.before_step()
    replica.before_step()
    optimizer.step()
    assert recorder.take() == ["before_step"]
    assert replica.rounds == 1
    replica.close()


def test_the_moment_can_be_called_by_hand():
    """Catches a round that ends twice when a strategy and an optimizer both say so."""
    run_ranks(foreign_optimizer, 1)


def compiled(rank, world_size):
    register_algorithm("recording")(Recording)
    for wraps in ("inside", "outside"):
        torch.manual_seed(0)
        model = torch.nn.Linear(4, 4)
        ddp = DistributedDataParallel(torch.compile(model, backend="eager") if wraps == "inside" else model)
        optimizer = torch.optim.SGD(ddp.parameters(), lr=0.1)
        replica = Replica(ddp, Recording(), [optimizer], timeout=TIMEOUT)
        network = torch.compile(ddp, backend="eager") if wraps == "outside" else ddp
        for _ in range(3):
            network(data(rank)).sum().backward()
            optimizer.step()
        assert replica.algorithm.take() == ROUND * 3, wraps
        replica.close()


def test_compiled_models_keep_the_moments():
    """Catches a moment that torch.compile traces once and forgets."""
    run_ranks(compiled, 2)


def keep_local(state, bucket):
    future = torch.futures.Future()
    future.set_result(bucket.buffer())
    return future


def let_ddp_divide(rank, world_size):
    torch.manual_seed(0)
    ddp = DistributedDataParallel(torch.nn.Linear(3, 2))
    data = torch.full((1, 3), float(rank + 1))

    def gradient():
        ddp.zero_grad()
        ddp(data).sum().backward()
        return ddp.module.weight.grad.clone()

    mean = gradient()
    for ending in (Replica.close, None):
        replica = Replica(ddp, GradientAllReduce(), timeout=TIMEOUT)
        before = replica.statistics.sent_bytes
        assert torch.equal(gradient(), mean)
        assert replica.statistics.sent_bytes > before
        if ending is not None:
            ending(replica)
        del replica
        gc.collect()
        assert torch.equal(gradient(), mean)
    ddp.register_comm_hook(None, keep_local)
    with pytest.raises(RuntimeError, match="communication hook"):
        Replica(ddp, GradientAllReduce(), timeout=TIMEOUT)
    return True


def test_ddp_may_divide_and_is_plain_ddp_afterwards():
    """Catches a DDP instance left with a group whose Python half is gone, and a hook that would be passed over."""
    assert run_ranks(let_ddp_divide, 2) == [True, True]
