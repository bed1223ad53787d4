"""How ranks come together: late ones, absent ones, a second time in one process, and again after torchrun has restarted them."""

import io
import logging
import os
import signal
import threading
import time
from datetime import timedelta
from unittest import mock

import pytest
import torch
from torch import nn

import lightning_accel as accel
from helpers.programs import agent_store, torchrun_variables
from helpers.ranks import run_ranks
from lightning_accel.transport import long_waits


def train(rank):
    """Trains a model, and returns what must not be let go of: DDP, which keeps the store of its group."""
    model = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    with accel.wrap(model, optimizer, "bytegrad") as ddp:
        ddp(torch.full((2, 3), 1.0 + rank)).sum().backward()
        optimizer.step()
    return ddp, model.weight.detach().clone()


def join_again(rank, world_size, port, joins):
    kept, weights = [], []
    for join in range(joins):
        if rank == join % world_size:
            time.sleep(0.3)  # the others come while this rank is still in its last group
        accel.init_process_group(rank=rank, world_size=world_size, port=port, timeout=timedelta(seconds=30), seed=0)
        ddp, trained = train(rank)
        kept.append(ddp)
        weights.append(trained)
        accel.destroy_process_group()
        if join == 1:
            kept.clear()  # and now the store goes with the group
    return weights


def test_a_process_joins_as_often_as_it_likes(port):
    """Catches a port that the store of an earlier group still has, and ranks that find an earlier group's addresses."""
    one, other = run_ranks(join_again, 2, port, 4, backend=None, timeout=100)
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(one, other, strict=True))
    assert all(torch.equal(one[0], later) for later in one[1:])


def be_restarted(rank, world_size, attempt, port, killed_rank):
    """Joins twice, and is killed in the second group of the first attempt."""
    weights = []
    with mock.patch.dict(os.environ, torchrun_variables(rank, world_size, port, attempt)):
        for join in range(2):
            accel.init_process_group(timeout=timedelta(seconds=30), seed=0)
            if (attempt, join, rank) == (0, 1, killed_rank):
                os.kill(os.getpid(), signal.SIGKILL)
            if (attempt, join) == (0, 1):
                with pytest.raises(RuntimeError):
                    train(rank)
            else:
                weights.append(train(rank)[1])
            accel.destroy_process_group()
    return weights


@pytest.mark.parametrize("killed_rank", [0, 1])
def test_ranks_that_torchrun_starts_again_find_each_other(killed_rank):
    """Catches addresses of killed ranks in the store of torchrun's agent, and those of an earlier group of the same ranks."""
    with agent_store() as port:
        for attempt in range(2):
            lost = {killed_rank} if attempt == 0 else ()
            results = run_ranks(be_restarted, 2, attempt, port, killed_rank, backend=None, lost=lost, timeout=60)
            assert [len(weights or ()) for weights in results] == ([2, 2] if attempt else [killed_rank, 1 - killed_rank])


def join_late(rank, world_size, port, late_rank, seconds):
    long_waits.FIRST_SECONDS, long_waits.AGAIN_SECONDS = 1.0, 1.0
    lines = io.StringIO()
    logging.getLogger("lightning_accel").addHandler(logging.StreamHandler(lines))
    if rank == late_rank:
        time.sleep(seconds)
    started = time.monotonic()
    error = None
    try:
        accel.init_process_group(rank=rank, world_size=world_size, port=port, timeout=timedelta(seconds=4))
        accel.destroy_process_group()
    except accel.CommunicationError as raised:
        error = str(raised)
    return lines.getvalue().splitlines(), error, time.monotonic() - started


def test_the_log_says_who_is_waited_for(port):
    """Catches half an hour of silence when a rank was not started, or cannot be reached."""
    place = f"of 3 ranks at 127.0.0.1:{port}, on rank"
    without_1 = f"lightning-accel: Waiting for 1 {place} {{rank}}: rank 1 has not come"
    on_time = run_ranks(join_late, 3, port, 1, 2.5, backend=None)
    for rank, (lines, error, _) in enumerate(on_time):
        assert error is None
        assert lines == [] if rank == 1 else len(lines) >= 2, "once after the first time, and again"
        assert all(line.startswith(without_1.format(rank=rank)) and line.endswith("s so far)") for line in lines), lines
    without_0 = f"lightning-accel: Waiting for 1 or more {place} {{rank}}: rank 0 does not answer"
    for rank, (lines, error, _) in enumerate(run_ranks(join_late, 3, port, 0, 1.5, backend=None)):
        assert error is None
        assert bool(lines) == (rank != 0), lines
        assert all(line.startswith(without_0.format(rank=rank)) for line in lines), lines


def test_a_rank_that_never_comes_ends_the_wait(port):
    """Catches a wait that goes on past its timeout, and an error that does not say for whom."""
    for late, why in ((1, "rank 1 has not come"), (0, "rank 0 does not answer")):
        results = run_ranks(join_late, 2, port, late, 1000, backend=None, lost={late})
        _, error, seconds = results[1 - late]
        assert why in error
        assert "the time is over" in error
        assert 4 <= seconds < 8


def wait_and_be_interrupted(rank, world_size, port):
    threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGINT)).start()
    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        accel.init_process_group(rank=rank + 1, world_size=3, port=port)
    assert time.monotonic() - started < 4


def test_ctrl_c_ends_the_wait_for_others(port):
    """Catches a wait inside of torch, which hears nothing."""
    run_ranks(wait_and_be_interrupted, 1, port, backend=None)
