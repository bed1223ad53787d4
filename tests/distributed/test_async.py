"""Averaging in the background: equal to its reference, whoever is slow; and its end, whoever fails."""

import contextlib
import gc
import os
import signal
import threading
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import lightning_accel as accel
from helpers.models import GivenGradients
from helpers.ranks import own_threads, run_ranks
from helpers.tensors import assert_same_bits
from lightning_accel import AsyncAverage, CommunicationError, Replica
from lightning_accel.algorithms.common.meetings import Averaging
from lightning_accel.collectives import weight_means
from lightning_accel.reference.async_average import AsyncAverage as Reference

TIMEOUT = timedelta(seconds=30)
"""Of a collective, where nothing should come near it."""

MOMENTS_SECONDS = 8.0
"""What "in moments, not at the timeout" means on a busy machine."""

RATE = 0.5
"""A power of two: the product with a gradient is exact, so an optimizer's step has the same bits however it is computed."""

WARMUP_STEPS = 2
"""DDP settles its buckets in them, for which ranks wait for rank 0."""

KINDS = ((700, torch.float32), (33, torch.float32), (40, torch.float32), (1500, torch.bfloat16), (5, torch.float16))
KINDS += ((64, torch.float64), (0, torch.float32))
TIED, FROZEN = (1, 2), 4
"""Places in KINDS: the second of the tied ones is the first one's parameter."""


def gradients_of(rank, step):
    generator = torch.Generator().manual_seed(100 * step + rank)
    given = [torch.randn(numel, generator=generator).to(dtype) for numel, dtype in KINDS]
    given[TIED[1]] = None
    return given


class Training:
    """Steps with given gradients, by hand: the clock of the averaging thread stands still unless it is moved."""

    def __init__(self, rank, world_size, device, **options):
        self.rank, self.world_size, self.device = rank, world_size, device
        shapes = gradients_of(0, 0)
        shapes[TIED[1]] = torch.zeros(KINDS[TIED[0]][0])
        module = GivenGradients(shapes, tied=[TIED], frozen=[FROZEN])
        torch.manual_seed(3 + rank)  # DDP gives all ranks rank 0's
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.normal_()
        module.to(device)
        self.ddp = DistributedDataParallel(module, bucket_cap_mb=0.001)
        self.optimizer = torch.optim.SGD([p for p in module.parameters() if p.requires_grad], lr=RATE)
        self.now = 0.0
        self.replica = Replica(self.ddp, AsyncAverage(**options), [self.optimizer], timeout=TIMEOUT)
        self.algorithm = self.replica.algorithm
        self.meetings = self.algorithm.meetings
        self.meetings.clock = lambda: self.now
        self.steps = 0
        self.may_average = threading.Event()
        self.may_average.set()
        mean = weight_means.mean

        def held_mean(*args):
            assert self.may_average.wait(20)
            mean(*args)

        weight_means.mean = held_mean

    @property
    def weights(self):
        return [parameter.detach().to("cpu", copy=True) for parameter in self.ddp.module.parameters()]

    def round(self, micro_batches=1):
        self.optimizer.zero_grad()
        gradients = [given if given is None else given.to(self.device) for given in gradients_of(self.rank, self.steps)]
        for k in range(micro_batches):
            with self.ddp.no_sync() if k < micro_batches - 1 else contextlib.nullcontext():
                self.ddp(gradients).backward()
        self.optimizer.step()
        self.steps += 1

    def become_due(self):
        self.now = self.meetings.due

    def become_late(self):
        self.now = self.meetings.due + self.meetings.interval_seconds

    def hold(self):
        self.may_average.clear()

    def release(self):
        self.may_average.set()

    def wait_for_averaging(self, number):
        deadline = time.monotonic() + 20
        while self.algorithm.averagings < number:
            assert time.monotonic() < deadline, f"averaging {number} did not come"
            time.sleep(0.002)
        assert self.algorithm.averagings == number


class References:
    """The same for all ranks, by the specification; a parameter each. The frozen one and the second tied one stay out."""

    def __init__(self, weights, world_size, steps=0):
        self.parameters = [Reference([weight] * world_size) for weight in weights]
        self.steps = [steps] * world_size

    def gradients(self, rank):
        given = gradients_of(rank, self.steps[rank])
        given[FROZEN] = torch.zeros_like(given[FROZEN])
        return [gradient for gradient in given if gradient is not None]

    def step(self, rank, factor=1):
        for parameter, gradient in zip(self.parameters, self.gradients(rank), strict=True):
            parameter.step(rank, -RATE * factor * gradient)
        self.steps[rank] += 1

    def step_together(self, world_size):
        """As warm-up does: DDP's mean, divided before the sum."""
        given = [self.gradients(rank) for rank in range(world_size)]
        for parameter, gradients in zip(self.parameters, zip(*given, strict=True), strict=True):
            mean = sum(gradient * (1 / world_size) for gradient in gradients)
            for rank in range(world_size):
                parameter.step(rank, -RATE * mean)
        self.steps = [step + 1 for step in self.steps]

    def each(self, event, *arguments):
        for place, parameter in enumerate(self.parameters):
            if place != FROZEN - 1:
                getattr(parameter, event)(*arguments)

    def check(self, rank, weights, what, exact=True):
        for k, (parameter, weight) in enumerate(zip(self.parameters, weights, strict=True)):
            if exact:
                assert_same_bits(weight, parameter.x[rank], f"{what}, rank {rank}, parameter {k}")
            else:
                # Three gradients are summed in gloo's order: two roundings of a sum, half of which the weight gets.
                bound = 2 * torch.finfo(weight.dtype).eps
                torch.testing.assert_close(weight, parameter.x[rank], rtol=bound, atol=4 * bound, msg=f"{what}, parameter {k}")


SCHEDULE = (
    # All in time; the first goes on while it waits for the last.
    ("due", 0), ("round", 0), ("accumulated", 0), ("due", 1), ("round", 1), ("average",), ("round", 0), ("round", 1),
    # Rank 1 is slow: it is answered for, three times, and gets it all at once.
    ("round", 1), ("due", 0), ("round", 0), ("late", 1), ("average",), ("due", 0), ("round", 0), ("late", 1), ("average",),
    ("due", 0), ("round", 0), ("round", 0), ("late", 1), ("average",), ("round", 1), ("round", 1), ("round", 0),
    # Nobody has given a snapshot: nothing changes.
    ("late", 0), ("late", 1), ("average",), ("round", 0),
    # Rank 0 has not applied what it got when the next averaging is over.
    ("due", 1), ("round", 1), ("late", 0), ("average",), ("due", 1), ("round", 1), ("late", 0), ("average",), ("round", 0),
    # An averaging takes its time. Rank 1 still has to apply what it got from the one before, and must not do it now.
    ("due", 0), ("round", 0), ("late", 1), ("average",), ("round", 0), ("hold",), ("due", 0), ("round", 0), ("late", 1),
    ("in flight",), ("round", 0), ("round", 1), ("round", 1), ("release",), ("average",), ("round", 1), ("round", 0),
    # A snapshot that was not averaged yet is dropped by consensus, and a correction is applied once.
    ("due", 0), ("round", 0), ("consensus",), ("round", 1), ("round", 0), ("due", 0), ("round", 0), ("due", 1), ("round", 1),
    ("average",), ("consensus",), ("consensus",), ("round", 0), ("pause",), ("round", 1), ("round", 0), ("resume",), ("round", 0),
    ("round", 1), ("due", 0), ("round", 0), ("late", 1), ("average",), ("round", 1), ("pause",), ("pause",), ("consensus",),
)  # fmt: skip


def follow_schedule(rank, world_size, device="cpu"):
    """Ranks from 2 on do what rank 1 does."""
    training = Training(rank, world_size, device, sync_interval_ms=1000, warmup_steps=WARMUP_STEPS)
    references = References(training.weights, world_size)
    spread = []
    for step in range(WARMUP_STEPS):
        training.round()
        references.step_together(world_size)
        references.check(rank, training.weights, f"warm-up {step}", exact=world_size == 2)
        references = References(training.weights, world_size, steps=step + 1)
    # The first rounds after it have nothing to wait for; they give the first contribution.
    training.round()
    for r in range(world_size):
        references.each("snapshot", r)
        references.step(r)
    averagings = 0
    due = [False] * world_size
    is_held = False
    for number, (event, *arguments) in enumerate(SCHEDULE):
        ranks = [r for r in range(world_size) if not arguments or min(r, 1) == arguments[0]]
        if event in ("hold", "release"):
            getattr(training, event)()
            is_held = event == "hold"
        elif event == "in flight":
            poll(lambda: training.meetings.averaging is Averaging.IN_FLIGHT, "no averaging")
        elif event in ("due", "late"):
            for r in ranks:
                due[r] = event == "due"
            if rank in ranks:
                getattr(training, f"become_{event}")()
        elif event == "average":
            averagings += 1
            training.wait_for_averaging(averagings)
            references.each("average")
            due = [False] * world_size
        elif event in ("round", "accumulated"):
            if rank in ranks:
                training.round(micro_batches=2 if event == "accumulated" else 1)
            for r in ranks:
                if not is_held:
                    references.each("correct", r)
                if due[r]:
                    references.each("snapshot", r)
                    due[r] = False
                references.step(r, factor=2 if event == "accumulated" else 1)
        else:
            getattr(training.replica, event)()
            if event == "consensus":
                references.each("consensus")
                due = [False] * world_size
                spread.append(spread_of(training.ddp.module))
            elif event == "pause":
                for r in range(world_size):
                    references.each("correct", r)
        references.check(rank, training.weights, f"event {number}, {event}")
        dist.barrier()
    training.replica.close()
    assert training.algorithm.state_dict() == {"rounds": training.steps}
    return averagings, spread


def spread_of(module):
    """The largest difference of a weight, or of a floating buffer, between this rank and rank 0."""
    own = torch.cat([tensor.detach().flatten().double().cpu() for tensor in module.state_dict().values()])
    others = own.clone()
    dist.broadcast(others, 0)
    return (own - others).abs().max().item()


@pytest.mark.parametrize("world_size", [2, 3])
def test_every_rank_equals_the_reference(world_size):
    """Catches, after each event: progress overwritten by an averaging, a correction lost, doubled, or applied while an
    averaging is in flight; a slow rank that is waited for or answered for with what others have already corrected; float16
    averaged in float16; frozen weights that move; a consensus that leaves ranks apart."""
    for averagings, spread in run_ranks(follow_schedule, world_size):
        assert averagings == sum(event == ("average",) for event in SCHEDULE)
        assert spread == [0.0] * 4


class Net(torch.nn.Module):
    """Gradients are what is given; a statistic and a count as BatchNorm has them."""

    def __init__(self, start=1.0):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.full((1000,), start, dtype=torch.float64))
        self.register_buffer("mean", torch.zeros(3))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))

    def forward(self, gradient):
        if self.training:
            self.mean += gradient
            self.count += 1
        return (self.weight * gradient).sum()


def free_running(rank, timeout=TIMEOUT, **options):
    """A replica whose threads meet by the real clock."""
    ddp = DistributedDataParallel(Net())
    optimizer = torch.optim.SGD(ddp.parameters(), lr=RATE)
    options = {"sync_interval_ms": 10, "warmup_steps": WARMUP_STEPS, **options}
    replica = Replica(ddp, AsyncAverage(**options), [optimizer], timeout=timeout)

    def train(rounds=1):
        for _ in range(rounds):
            optimizer.zero_grad()
            ddp(1.0 + rank).backward()
            optimizer.step()

    return ddp, replica, train


def poll(condition, what, seconds=20.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.002)


def one_is_slow(rank, world_size, folder):
    ddp, replica, train = free_running(rank)
    algorithm, done = replica.algorithm, Path(folder) / "done"
    train(WARMUP_STEPS + 1)
    before = algorithm.averagings
    if rank == 0:
        # Nothing but rank 1's averaging thread can answer.
        poll(lambda: train() or algorithm.averagings >= before + 5, "rank 0 trains, and waits for nobody")
        done.touch()
        rounds = replica.rounds
    else:
        ddp.module.register_forward_pre_hook(lambda *_: poll(done.exists, "rank 0 was waited for"))
        train()
        rounds = replica.rounds
    train(10)
    # Rank 0 comes to the end first, and goes on answering while it waits.
    if rank == 1:
        met = algorithm.averagings
        poll(lambda: train() or algorithm.averagings >= met + 3, "rank 1 is not at its end yet")
    replica.consensus()
    counts = [None] * world_size
    dist.all_gather_object(counts, replica.rounds)
    # Its own step for each round of each rank, and the mean of all of them.
    steps = [WARMUP_STEPS * 1.5 + (count - WARMUP_STEPS) * (1.0 + r) for r, count in enumerate(counts)]
    expected = 1.0 - RATE * sum(steps) / world_size
    weight = ddp.module.weight.detach()
    assert (weight - weight[0]).abs().max() == 0
    # Every averaging rounds a few times, by less than eps of the largest weight there was.
    assert abs(weight[0].item() - expected) <= 8 * (algorithm.averagings + 1) * 2**-52 * max(steps)
    assert spread_of(ddp.module) == 0
    replica.close()
    return rounds, counts


def test_a_slow_rank_is_answered_for_and_no_step_is_lost(tmp_path):
    """Catches training threads that wait for a slow rank, an averaging that waits for a training thread, an end that waits
    without answering, and, under races as they come, a correction that is lost or applied twice."""
    (fast, counts), (slow, _) = run_ranks(one_is_slow, 2, str(tmp_path))
    assert slow == WARMUP_STEPS + 2
    assert fast > slow
    assert counts[0] >= fast + 10


def pauses(rank, world_size):
    ddp, replica, train = free_running(rank, sync_interval_ms=1, warmup_steps=0)
    poll(lambda: train() or replica.algorithm.averagings > 0, "no averaging")
    for cycle in range(100):
        train((cycle + rank) % 4)
        time.sleep(0.001 * (cycle % 5))
        replica.pause()
        replica.resume()
    for _ in range(2):
        replica.pause()
        assert replica.algorithm.is_terminating is False
    # Paused: each trains by itself, and nothing is in flight.
    met, sent = replica.algorithm.averagings, replica.statistics.sent_bytes
    before = ddp.module.weight.detach().clone()
    train(3)
    time.sleep(0.1)
    train(3)
    assert replica.statistics.sent_bytes == sent
    torch.testing.assert_close(ddp.module.weight.detach(), before - 6 * RATE * (1.0 + rank), rtol=1e-12, atol=0)
    # Consensus in between does not end a pause that the user began.
    replica.consensus()
    assert spread_of(ddp.module) == 0
    sent = replica.statistics.sent_bytes
    train(3)
    assert (replica.algorithm.averagings, replica.statistics.sent_bytes) == (met, sent)
    # A rank that has not trained meets the others all the same.
    for _ in range(2):
        replica.resume()
    if rank == 0:
        train(3)
    replica.pause()
    replica.resume()
    poll(lambda: train() or replica.algorithm.averagings > met + 1, "averaging goes on")
    replica.consensus()
    started = time.monotonic()
    replica.close()
    replica.close()
    assert time.monotonic() - started < MOMENTS_SECONDS
    assert own_threads() == []


def test_a_hundred_pauses():
    """Catches a stop that one rank misses, messages that go on in a pause, a second pause that hangs, a thread left behind."""
    run_ranks(pauses, 2)


def consensus_between_micro_batches(rank, world_size):
    ddp, replica, train = free_running(rank, sync_interval_ms=60_000, warmup_steps=0)
    optimizer = torch.optim.SGD(ddp.parameters(), lr=RATE)
    train(3)
    optimizer.zero_grad()
    with ddp.no_sync():
        ddp(1.0).backward()
    statistics, before = ddp.module.mean.clone(), ddp.module.weight.detach().clone()
    with torch.inference_mode():
        replica.consensus()  # as at the start of Lightning's validation
        ddp.eval()
        ddp(1.0)
    ddp.module.train()
    mean = before.clone()
    dist.all_reduce(mean)
    assert torch.equal(ddp.module.weight.detach(), mean / world_size)
    assert not torch.equal(ddp.module.weight.detach(), before)
    # 3 rounds of 1 or 2, and one of 1: the mean of 4 and 7.
    assert statistics.tolist() == [4.0 + 3 * rank] * 3
    assert ddp.module.mean.tolist() == [5.5] * 3
    assert ddp.module.count.item() == 4
    assert torch.equal(ddp.module.weight.grad, torch.ones(1000, dtype=torch.float64))
    ddp(2.0).backward()
    optimizer.step()
    torch.testing.assert_close(ddp.module.weight.detach(), mean / world_size - 3 * RATE, rtol=1e-12, atol=0)
    replica.consensus()
    assert spread_of(ddp.module) == 0
    replica.close()


def test_consensus_between_micro_batches():
    """Catches gradients of the first half that are lost, statistics of BatchNorm that stay apart, buffers that cannot be
    changed in inference mode, counts that are summed."""
    run_ranks(consensus_between_micro_batches, 2)


def warm_up(rank, world_size):
    torch.manual_seed(0)
    ours, plain = (
        DistributedDataParallel(torch.nn.Sequential(torch.nn.Linear(30, 50), torch.nn.Linear(50, 7))) for _ in range(2)
    )
    plain.module.load_state_dict(ours.module.state_dict())
    optimizers = [torch.optim.Adam(ddp.parameters()) for ddp in (ours, plain)]
    replica = Replica(ours, AsyncAverage(sync_interval_ms=1, warmup_steps=6), optimizers[:1], timeout=TIMEOUT)
    for step in range(7):
        for ddp, optimizer in zip((ours, plain), optimizers, strict=True):
            optimizer.zero_grad()
            torch.manual_seed(10 * step + rank)
            ddp(torch.randn(4, 30)).square().sum().backward()
            optimizer.step()
        same = [torch.equal(a, b) for a, b in zip(ours.parameters(), plain.parameters(), strict=True)]
        assert all(same) == (step < 6), f"step {step}: {same}"
        if step == 3:
            # A mean of three equal numbers need not be that number.
            replica.consensus()
            assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), plain.parameters(), strict=True))
    replica.consensus()
    assert spread_of(ours.module) == 0
    replica.close()


def test_warm_up_equals_ddp():
    """Catches gradients divided in another way, a warm-up that is one round short or long, and averaging during it."""
    run_ranks(warm_up, 3)


def failing(rank, world_size, how):
    """Rank 1 fails while both train; rank 0 learns of it at one of its next rounds."""
    ddp, replica, train = free_running(rank)
    train(WARMUP_STEPS)
    poll(lambda: train() or replica.algorithm.averagings > 1, "no averaging")
    started = time.monotonic()
    if rank == 1:
        if how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if how == "closed":
            replica.close()
        if how == "dropped":
            ddp._forward_pre_hooks.clear()
            del replica, train, ddp
            poll(lambda: gc.collect() >= 0 and not own_threads(), "the thread of a replica that is gone")
            return True
        if how == "interrupted":
            # While it waits in a pause for rank 0, which does not come.
            threading.Timer(0.3, signal.raise_signal, [signal.SIGINT]).start()
            with pytest.raises(KeyboardInterrupt):
                replica.pause()
            replica.close()
        if how == "averaging":

            def broken(*args, **options):
                raise ValueError("injected")

            original, dist.all_reduce = dist.all_reduce, broken
    if rank == 0 or how == "averaging":
        with pytest.raises(CommunicationError, match=rf"async: averaging failed on rank {rank} of 2") as caught:
            poll(lambda: train(), "rank 0 never learns of it")
        assert caught.value.__cause__ is not None
        with pytest.raises(CommunicationError):
            replica.pause()
        with pytest.raises(CommunicationError):
            replica.consensus()
    if how == "averaging" and rank == 1:
        dist.all_reduce = original
    replica.close()
    assert time.monotonic() - started < MOMENTS_SECONDS
    assert own_threads() == []
    return True


@pytest.mark.parametrize("how", ["killed", "closed", "dropped", "interrupted", "averaging"])
def test_a_failure_on_one_rank_ends_the_other(how):
    """Catches a rank that trains on by itself for good, an averaging thread that outlives its replica, and a close that
    waits for a message that never comes."""
    killed = how == "killed"
    assert run_ranks(failing, 2, how, lost={1} if killed else ()) == [True, None if killed else True]


def not_joined(rank, world_size):
    """Rank 1 trains on; its averaging thread answers, but the pause is not complete."""
    _, replica, train = free_running(rank, timedelta(seconds=1), warmup_steps=0)
    train(3)
    if rank == 0:
        with pytest.raises(CommunicationError, match=r"async: pause failed on rank 0 .*other ranks did not join within \d+ s"):
            replica.pause()
    else:
        with pytest.raises(CommunicationError):
            poll(lambda: train(), "rank 1 trains on although rank 0 has given up")
    replica.close()


def test_a_pause_that_one_rank_never_joins_ends_in_time():
    """Catches a wait whose bound begins anew with each answer of the other rank's thread."""
    run_ranks(not_joined, 2)


def skipping(rank, world_size):
    """Rank 1's gradients overflow, so its scaler skips the steps, and its scale is another."""
    ddp, replica, _ = free_running(rank, warmup_steps=0)
    optimizer = torch.optim.SGD(ddp.parameters(), lr=RATE)
    replica.attach_optimizers([optimizer])
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)

    def train():
        optimizer.zero_grad()
        scaler.scale(ddp(float("inf") if rank else 1.0)).backward()
        replica.before_step()
        scaler.step(optimizer)
        scaler.update()

    poll(lambda: train() or replica.algorithm.averagings >= 5, "a rank that skips its steps is waited for")
    replica.consensus()
    assert ddp.module.weight.isfinite().all()
    assert (ddp.module.weight < 1).all()  # rank 0's steps
    others = ddp.module.weight.detach().clone()
    dist.broadcast(others, 0)
    assert torch.equal(ddp.module.weight.detach(), others)
    assert replica.algorithm.state_dict() == {"rounds": replica.rounds}
    replica.close()
    return replica.rounds, scaler.get_scale()


def test_a_scaler_that_skips_steps_on_one_rank():
    """Catches rounds that only an optimizer's step ends, and averagings that wait for one."""
    (rounds, scale), (others_rounds, others_scale) = run_ranks(skipping, 2)
    assert min(rounds, others_rounds) >= 5
    assert others_scale < scale


def plainly(rank, world_size, folder):
    """wrap, with, unwrap and checkpoints."""
    generator = torch.Generator().manual_seed(rank)

    def make():
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.BatchNorm1d(8), torch.nn.Linear(8, 2))
        return model, torch.optim.Adam(model.parameters())

    def train(ddp, optimizer, rounds):
        for _ in range(rounds):
            optimizer.zero_grad()
            ddp(torch.randn(4, 6, generator=generator)).square().mean().backward()
            optimizer.step()

    path = Path(folder) / "async.pt"
    model, optimizer = make()
    with accel.wrap(model, optimizer, "async", sync_interval_ms=5, warmup_steps=1) as ddp:
        train(ddp, optimizer, 3 + rank)
        poll(lambda: train(ddp, optimizer, 1) or ddp.replica.algorithm.averagings > 0, "no averaging")
        accel.save_checkpoint(path, ddp, optimizer)
        saved = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        rounds = ddp.replica.rounds
        met = ddp.replica.algorithm.averagings
        poll(lambda: train(ddp, optimizer, 1) or ddp.replica.algorithm.averagings > met, "no averaging")
        # What was averaged before the weights were loaded must not move them.
        ddp.replica.algorithm.meetings.has_correction = True
        accel.load_checkpoint(path, ddp, optimizer)
        ddp.replica.consensus()
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, saved[name]), name
        # Rank 0's counters.
        counts = [None] * world_size
        dist.all_gather_object(counts, (rounds, ddp.replica.rounds, ddp.replica.algorithm.state_dict()["rounds"]))
        assert {restored for _, *both in counts for restored in both} == {counts[0][0]}
        met = ddp.replica.algorithm.averagings
        poll(lambda: train(ddp, optimizer, 1) or ddp.replica.algorithm.averagings > met, "no averaging")
        if rank == 1:
            time.sleep(0.2)
            train(ddp, optimizer, 3)
    # The block's end has waited for rank 1.
    assert spread_of(model) == 0
    assert own_threads() == []

    model, optimizer = make()
    ddp = accel.wrap(model, optimizer, accel.AsyncAverage(sync_interval_ms=5))
    train(ddp, optimizer, 20)
    assert accel.unwrap(ddp) is model
    assert spread_of(model) == 0

    # An exception that is one rank's alone.
    model, optimizer = make()
    with pytest.raises((ValueError, CommunicationError)) as caught, accel.wrap(model, optimizer, "async") as ddp:
        train(ddp, optimizer, 3)
        if rank == 1:
            raise ValueError("mine")
        poll(lambda: train(ddp, optimizer, 1), "rank 0 trains on")
    assert caught.type is (ValueError if rank else CommunicationError)

    model, optimizer = make()
    with pytest.raises(ValueError, match="async does not go with find_unused_parameters=True: DDP then waits"):
        accel.wrap(model, optimizer, "async", find_unused_parameters=True)
    with pytest.raises(ValueError, match="async exchanges weights once a step, and LBFGS"):
        accel.wrap(model, torch.optim.LBFGS(model.parameters()), "async")
    return True


def test_plain_pytorch(tmp_path):
    """Catches ends and files with weights that differ between ranks, a correction applied to weights it was not made for,
    an end that an exception turns into a hang, and options that cannot work but are taken."""
    assert run_ranks(plainly, 2, str(tmp_path)) == [True, True]


def alone(rank, world_size):
    ddp, replica, train = free_running(rank, warmup_steps=0)
    train(3)
    for method in (replica.consensus, replica.pause, replica.resume, replica.consensus):
        method()
    assert ddp.module.weight[0].item() == 1.0 - 3 * RATE
    assert own_threads() == []
    replica.close()


def test_a_single_process_averages_with_nobody():
    """Catches a thread and messages where there is nobody to talk to."""
    run_ranks(alone, 1)
