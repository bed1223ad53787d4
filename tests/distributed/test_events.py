"""The observer sees every message: names, queues, bytes; and what is counted is the sum of what is seen."""

import pytest
import torch
from torch.nn.parallel import DistributedDataParallel

from helpers.ranks import run_ranks
from lightning_accel import AsyncAverage, ByteGrad, CommunicationError, Decentralized, GradientAllReduce, Replica
from lightning_accel.background.pipeline import Pipeline
from lightning_accel.reference.collectives import compressed_all_reduce

STEPS = {
    ("bytegrad", "a", 2): ["encode", "sum"],
    ("bytegrad", "a", 3): ["encode", "sum", "decode"],
    ("bytegrad", "node {}", 4): ["reduce", "gather"],
    ("gradient_allreduce", "a", 3): ["all_reduce"],
    ("decentralized", "a", 2): ["exchange"],
}


def observe(rank, world_size, algorithm, node_name):
    torch.manual_seed(0)
    ddp = DistributedDataParallel(torch.nn.Linear(700, 3))
    optimizer = torch.optim.SGD(ddp.parameters(), lr=0.1)
    replica = Replica(ddp, algorithm, [optimizer], node_name=node_name.format(rank // 2))
    events = []
    unsubscribe = replica.communicator.events.subscribe(events.append)
    before = replica.statistics  # algorithms that exchange weights have compared the ranks' models
    for _ in range(3):
        optimizer.zero_grad()
        ddp(torch.randn(4, 700)).sum().backward()
        optimizer.step()
    replica.pause()
    replica.consensus()
    statistics = replica.statistics
    seen = len(events)
    unsubscribe()
    ddp(torch.randn(4, 700)).sum().backward()
    replica.close()
    assert len(events) == seen
    assert sum(event.sent_bytes for event in events) == statistics.sent_bytes - before.sent_bytes > 0
    seconds = statistics.communication_seconds - before.communication_seconds
    assert sum(event.seconds for event in events) == pytest.approx(seconds)
    return [(event.label, event.step, event.queue, event.sent_bytes) for event in events]


@pytest.mark.parametrize(
    ("algorithm", "node_name", "world_size"),
    [
        (ByteGrad(), "a", 2),
        (ByteGrad(), "a", 3),
        (ByteGrad(), "node {}", 4),
        (GradientAllReduce(), "a", 3),
        (Decentralized(), "a", 2),
        (AsyncAverage(sync_interval_ms=1), "a", 2),
    ],
    ids=lambda value: getattr(value, "name", value),
)
def test_every_step_is_seen_with_its_bytes(algorithm, node_name, world_size):
    """Catches a message that passes the observer by, is counted twice, or stands under another queue's name."""
    for events in run_ranks(observe, world_size, algorithm, node_name):
        expected = STEPS.get((algorithm.name, node_name, world_size))
        if expected is not None:
            first = events[0][0]
            steps = [step for label, step, _, _ in events if label == first]
            assert steps[: len(expected)] == expected
            queues = {queue for label, _, queue, _ in events if label == first}
            assert len(queues) == len(expected)
        assert all(queue.startswith(f"{algorithm.name} ") for _, _, queue, _ in events)


def observer_that_raises(rank, world_size):
    ddp = DistributedDataParallel(torch.nn.Linear(700, 3))
    replica = Replica(ddp, ByteGrad())

    def fail(event):
        raise ValueError("the observer broke")

    replica.communicator.events.subscribe(fail)
    with pytest.raises(CommunicationError):
        ddp(torch.randn(4, 700)).sum().backward()
    replica.close()


def test_an_observer_that_raises_is_a_failure():
    """Catches an error that is lost on a thread, with a future that never completes."""
    run_ranks(observer_that_raises, 2)


def pseudo_gradients(rank, world_size, seed):
    """A pipeline without DDP: what a rank holds afterwards."""
    ddp = DistributedDataParallel(torch.nn.Linear(1, 1))
    replica = Replica(ddp, GradientAllReduce())
    sizes = [700, 5, 1300]
    pipeline = Pipeline(replica.communicator, sizes, torch.device("cpu"), "int8", hierarchical=False)
    planned = pipeline.plan(torch.float32, ((2, 0), (0, 1300)))
    prepared = []
    results = []
    for step in range(2):
        values = torch.randn(2000, generator=torch.Generator().manual_seed(seed + 10 * step + rank))
        arguments = "pseudo-gradient", values, planned, world_size
        future = pipeline.all_reduce(*arguments, prepare=lambda: prepared.append("prepared"))
        replica.communicator.wait()
        results.append(future.wait().clone())
    replica.close()
    assert prepared == ["prepared"] * 2
    return results


@pytest.mark.parametrize("world_size", [2, 3])
def test_the_pipeline_needs_no_ddp(world_size):
    """Catches a pipeline that works for DDP's buckets alone, or for all of a layout's parameters alone."""
    results = run_ranks(pseudo_gradients, world_size, 5)
    for step in range(2):
        values = [torch.randn(2000, generator=torch.Generator().manual_seed(5 + 10 * step + rank)) for rank in range(world_size)]
        expected = torch.cat(
            [compressed_all_reduce([v[part] for v in values], "int8", world_size) for part in (slice(0, 1300), slice(1300, 2000))]
        )
        for of_rank in results:
            assert torch.equal(of_rank[step], expected)
