"""What DDP itself sends in a step: buffers, which parameters were used, the order of its buckets. Right values, and failures."""

import copy
import os
import re
import signal
import threading
import time
from datetime import timedelta

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import lightning_accel as accel
from helpers.ranks import own_threads, run_ranks
from helpers.tensors import assert_same_bits

MOMENTS_SECONDS = 8.0
"""What "in moments, not at the timeout" means on a busy machine; alone it takes a tenth of a second."""


class Buffered(nn.Module):
    """A model with buffers of all kinds, some of which differ between ranks until they are broadcast."""

    def __init__(self, rank=0, large=0):
        super().__init__()
        self.linear, self.norm = nn.Linear(6, 5), nn.BatchNorm1d(5)
        self.unused = nn.Linear(2, 2)
        self.register_buffer("flag", torch.tensor(rank == 0))
        self.register_buffer("strided", torch.arange(12.0).view(3, 4).t() + rank)
        self.register_buffer("complex", torch.full((3,), rank + 1j))
        self.register_buffer("empty", torch.zeros(0))
        self.register_buffer("low", torch.full((3,), 0.5 + rank, dtype=torch.bfloat16), persistent=False)
        self.register_buffer("large", torch.arange(float(large)) + rank)

    def forward(self, inputs):
        return self.norm(self.linear(inputs))


def data_of(rank, step):
    return torch.randn(4, 6, generator=torch.Generator().manual_seed(10 * step + rank))


def make(rank, large=0, **options):
    torch.manual_seed(0)
    model = Buffered(rank, large)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)  # a codec's means are not DDP's
    return model, optimizer, {"find_unused_parameters": True, **options}


def step(ddp, optimizer, rank, number):
    optimizer.zero_grad()
    ddp(data_of(rank, number)).square().sum().backward()
    optimizer.step()


def train_both(rank, world_size, algorithm, large):
    model, optimizer, options = make(rank, large)
    plain = DistributedDataParallel(copy.deepcopy(model), **options)
    plain_optimizer = torch.optim.SGD(plain.parameters(), lr=0.0)
    with accel.wrap(model, optimizer, algorithm, **options) as ddp:
        for number in range(4):
            if number == 2:  # as a cache grows, on all ranks alike
                for module in (model, plain.module):
                    module.large = torch.arange(5000.0 + large) + 10 * rank
            for one, one_optimizer in ((ddp, optimizer), (plain, plain_optimizer)):
                step(one, one_optimizer, rank, number)
            if number == 3:
                for one in (ddp, plain):
                    one.eval()
                    with torch.inference_mode():  # the first forward without gradients broadcasts too, later ones do not
                        one(data_of(rank, number))
                        one(data_of(rank, number))
                    one.train()
                    one.module.large += rank
                    step(one, one_optimizer, rank, 4)
            expected = dict(plain.module.named_buffers())
            for name, buffer in model.named_buffers():
                assert_same_bits(buffer, expected[name], f"rank {rank}, step {number}, {name}")
        assert copy.deepcopy(ddp).module.flag == model.flag
    ddp(data_of(rank, 9))  # plain DDP again, which broadcasts
    plain(data_of(rank, 9))
    assert_same_bits(model.norm.running_mean, plain.module.norm.running_mean, "after unwrap")
    return [buffer.clone() for name, buffer in model.named_buffers() if name != "flag"]


@pytest.mark.parametrize(("world_size", "algorithm", "large"), [(2, "gradient_allreduce", 0), (3, "bytegrad", 9000)])
def test_buffers_are_those_of_ddp(world_size, algorithm, large):
    """Catches a buffer that is forgotten, of another rank, or broadcast at another moment than DDP would choose."""
    run_ranks(train_both, world_size, algorithm, large)


CASES = {
    "buffers": (Buffered, "gradient_allreduce", {"find_unused_parameters": True}, 2),
    "order of buckets": (lambda: nn.Linear(6, 5), "bytegrad", {}, 1),
    # Nothing else is sent in that step.
    "used parameters": (
        lambda: nn.Linear(6, 5),
        "decentralized",
        {"find_unused_parameters": True, "communication_interval": 9},
        2,
    ),
}
"""What is waited for: model, algorithm, options, and the step in which that is so."""

TIMEOUT_SECONDS = 2.0


def fail(rank, world_size, label, fault):
    make_model, algorithm, options, faulty_step = CASES[label]
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    timeout = timedelta(seconds=30 if fault == "killed" else TIMEOUT_SECONDS)
    ddp = accel.wrap(model, optimizer, algorithm, timeout=timeout, **options)
    for number in range(faulty_step):
        step(ddp, optimizer, rank, number)
    if rank == 1:
        os.kill(os.getpid(), {"killed": signal.SIGKILL, "stuck": signal.SIGSTOP}[fault])
    before = [parameter.detach().clone() for parameter in model.parameters()]
    started = time.perf_counter()
    with pytest.raises(accel.CommunicationError) as caught:
        step(ddp, optimizer, rank, faulty_step)
    seconds = time.perf_counter() - started
    assert re.search(
        rf"{algorithm}: {label} failed on rank 0 of 2: .*look for a rank that was killed", str(caught.value), re.DOTALL
    )
    assert seconds < MOMENTS_SECONDS if fault == "killed" else TIMEOUT_SECONDS * 0.9 < seconds < TIMEOUT_SECONDS + MOMENTS_SECONDS
    assert all(map(torch.equal, before, model.parameters()))
    with pytest.raises(accel.CommunicationError):
        ddp(data_of(rank, 0))
    started = time.perf_counter()
    ddp.replica.close()
    assert time.perf_counter() - started < MOMENTS_SECONDS
    assert not own_threads()
    return True


@pytest.mark.parametrize("fault", ["killed", "stuck"])
@pytest.mark.parametrize("label", CASES)
def test_a_rank_that_is_gone_or_stuck_ends_the_others(label, fault):
    """Catches a collective on DDP's own group: an error without a name, or a wait for that group's timeout, a minute here."""
    assert run_ranks(fail, 2, label, fault, lost={1}, timeout=50) == [True, None]


def interrupt(rank, world_size, label):
    make_model, algorithm, options, faulty_step = CASES[label]
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ddp = accel.wrap(model, optimizer, algorithm, **options)
    for number in range(faulty_step):
        step(ddp, optimizer, rank, number)
    if rank == 1:
        os.kill(os.getpid(), signal.SIGSTOP)
    threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
    started = time.perf_counter()
    with pytest.raises(KeyboardInterrupt):
        step(ddp, optimizer, rank, faulty_step)
    seconds = time.perf_counter() - started
    ddp.replica.close()
    return seconds


@pytest.mark.parametrize("label", CASES)
def test_ctrl_c_is_heard_while_a_rank_waits(label):
    """Catches a wait inside of torch."""
    seconds, _ = run_ranks(interrupt, 2, label, lost={1}, timeout=50)
    assert 0.5 < seconds < 4, "under two seconds on a machine at rest"


def buffers_that_differ(rank, world_size, sizes):
    model, optimizer, options = make(rank)
    ddp = accel.wrap(model, optimizer, "gradient_allreduce", **options)
    step(ddp, optimizer, rank, 0)
    model.large = torch.zeros(sizes[rank])
    with pytest.raises(accel.CommunicationError) as caught:
        for number in range(2):  # rank 0, which only sends, may hear of it a step later
            step(ddp, optimizer, rank, number)
    ddp.replica.close()
    return str(caught.value)


@pytest.mark.parametrize("sizes", [(0, 1, 0), (10, 100000, 10), (100000, 10, 100000), (100000, 99999, 0)])
def test_buffers_of_different_sizes_end_with_an_error(sizes):
    """Catches gloo's end of the process by SIGABRT when a message is longer than expected."""
    said = run_ranks(buffers_that_differ, 3, sizes)
    for rank in range(1, 3):
        if sizes[rank] != sizes[0]:
            assert re.search(rf"buffers failed on rank {rank} of 3: ValueError: .*rank 0 has \d+ bytes", said[rank])
