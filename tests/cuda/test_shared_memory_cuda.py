"""All_reduces over memory that ranks share: the same bits as by messages, and a rank that does not come ends the others.

All ranks share one GPU: torch allows it where a variable says so, and each kernel waits while the others have the GPU.
"""

import contextlib
import os
import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

import lightning_accel as accel
from helpers.ranks import run_ranks
from lightning_accel.collectives.message_plan import TwoShotPlan, pieces_of
from lightning_accel.collectives.shared_memory import PeerMemory, open_peer_memory
from lightning_accel.collectives.two_shot import compressed_all_reduce
from lightning_accel.compression.block_layout import Layout
from lightning_accel.compression.error_feedback import Feedback, Residuals
from lightning_accel.transport.group import Group
from lightning_accel.transport.scratch import Scratch

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU"),
]

SIZES = [[1_000_003, 7, 512], [3], [40_000, 1, 0, 513, 90_001], [2_000_000]]


@contextlib.contextmanager
def variables(**values):
    os.environ.update(values)
    try:
        yield
    finally:
        for name in values:
            del os.environ[name]


def plan_of(codec, dtype, numels, group):
    layout = Layout(numels, group.world_size)
    offsets = [sum(numels[:i]) for i in range(len(numels))]
    pieces = pieces_of(layout, list(enumerate(offsets)))
    return layout, TwoShotPlan.build(codec, dtype, pieces, group.world_size, group.rank)


def feedback_of(layout, group, device, generator):
    numels = layout.numel, layout.numel if group.world_size <= 2 else layout.owned_numels[group.rank]
    # What two ranks both sum has the same residuals on both.
    server = torch.Generator().manual_seed(9) if group.world_size <= 2 else generator
    memory = [torch.randn(numel, generator=g).mul_(0.01).to(device) for numel, g in zip(numels, (generator, server), strict=True)]
    return Feedback(*(Residuals(one, one) for one in memory))


def equals_messages(rank, n):
    device = torch.device("cuda", 0)
    group, scratch = Group(dist.group.WORLD), Scratch()
    with variables(TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES="1"):
        for codec in ("int8", "none"):
            for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
                plans = [plan_of(codec, dtype, numels, group) for numels in SIZES]
                peers = open_peer_memory(group, [p for _, p in plans], device, timedelta(seconds=60), is_one_node=True)
                assert peers is not None, "memory is not shared"
                calls = []
                for repeat, (layout, plan) in enumerate(plans * 3):
                    generator = torch.Generator().manual_seed(100 * repeat + rank)
                    values = torch.randn(max(plan.everything.tensor_numel, 1), dtype=torch.float64, generator=generator)
                    on_cpu = values.to(dtype)
                    on_cuda = on_cpu.to(device)
                    state = generator.get_state()
                    feedback = {"cpu": None, "cuda": None}
                    if codec == "int8" and repeat % 2:
                        for name in feedback:
                            generator.set_state(state)
                            feedback[name] = feedback_of(layout, group, name, generator)
                    compressed_all_reduce(on_cpu, plan, group, scratch, divisor=n, feedback=feedback["cpu"])
                    calls.append((layout, plan, on_cpu, on_cuda, feedback))
                # All are enqueued before anybody looks: ranks meet in the memory alone, some of them late.
                for repeat, (_, plan, _, on_cuda, feedback) in enumerate(calls):
                    if repeat % n == rank:
                        torch.cuda._sleep(10_000_000)
                    peers.all_reduce(on_cuda, plan, divisor=n, feedback=feedback["cuda"])
                torch.cuda.synchronize()
                peers.check()
                for layout, _, on_cpu, on_cuda, feedback in calls:
                    what = f"{codec}, {dtype}, sizes {layout.numels}"
                    assert torch.equal(on_cuda.cpu().view(torch.uint8), on_cpu.view(torch.uint8)), what
                    for kind in ("worker", "server") if feedback["cpu"] else ():
                        one, other = (getattr(feedback[name], kind).updated.cpu() for name in feedback)
                        assert torch.equal(one, other), f"{what}: residuals of the {kind}"
                dist.barrier()  # before the memory goes
                peers.close()


@pytest.mark.timeout(200)
@pytest.mark.parametrize("n", [2, 4])
def test_equals_messages(n):
    """Catches an order of sums, a scale or a residual that differs, flags of the call before, codes read too early, and a call
    that writes where others still read those of the one before."""
    run_ranks(equals_messages, n, timeout=180)


def miss_one(rank, n):
    device = torch.device("cuda", 0)
    group = Group(dist.group.WORLD)
    _, plan = plan_of("int8", torch.float32, [100_000], group)
    tensor = torch.ones(100_000, device=device)  # the first use of the GPU takes seconds, if several processes begin
    with variables(TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES="1"):
        peers = open_peer_memory(group, [plan], device, timedelta(seconds=5), is_one_node=True)
    peers.all_reduce(tensor, plan, divisor=n)
    torch.cuda.synchronize()
    assert tensor.eq(1).all()
    if rank == n - 1:
        time.sleep(25)  # alive, so that its memory is there, but it does not come
        return
    started = time.monotonic()
    peers.all_reduce(tensor, plan, divisor=n)
    torch.cuda.synchronize()
    assert time.monotonic() - started < 15
    assert tensor.isnan().all(), "stepped with what had arrived"
    with pytest.raises(TimeoutError, match=f"rank {n - 1} of {n} did not come"):
        peers.all_reduce(tensor, plan, divisor=n)


def end_it(rank, n):
    device = torch.device("cuda", 0)
    group = Group(dist.group.WORLD)
    _, plan = plan_of("int8", torch.float32, [100_000], group)
    tensor = torch.ones(100_000, device=device)
    with variables(TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES="1"):
        peers = open_peer_memory(group, [plan], device, timedelta(seconds=60), is_one_node=True)
    if rank == 0:
        peers.all_reduce(tensor, plan, divisor=n)
        time.sleep(0.5)
        started = time.monotonic()
        peers.abort()
        torch.cuda.synchronize()
        assert time.monotonic() - started < 10
        assert tensor.isnan().all()
    dist.barrier()


def test_the_host_ends_a_wait():
    """Catches a kernel that waits out its time though communication has failed elsewhere, and holds up the teardown."""
    run_ranks(end_it, 2, timeout=60)


@pytest.mark.parametrize("n", [2, 3])
def test_a_rank_that_does_not_come_ends_the_others(n):
    """Catches a kernel that spins for ever, and a result made of what had arrived."""
    run_ranks(miss_one, n, timeout=90)


def train(rank, n):
    device = torch.device("cuda", 0)
    torch.cuda.set_device(device)
    calls = []
    one_kernel = PeerMemory.all_reduce
    PeerMemory.all_reduce = lambda self, *args, **options: (calls.append(1), one_kernel(self, *args, **options))[1]
    weights = []
    for shared_memory in (False, True):
        assert not calls
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(64, 700), torch.nn.ReLU(), torch.nn.Linear(700, 5)).to(device)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        options = {"error_feedback": True, "shared_memory": shared_memory}
        with variables(TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES="1"), accel.wrap(model, optimizer, "bytegrad", **options) as ddp:
            for step in range(6):
                optimizer.zero_grad()
                generator = torch.Generator().manual_seed(100 * rank + step)
                ddp(torch.randn(8, 64, generator=generator).to(device)).square().mean().backward()
                optimizer.step()
            torch.cuda.synchronize()
        weights.append([p.detach().cpu() for p in model.parameters()])
    assert calls, "memory was not shared"
    for one, other in zip(*weights, strict=True):
        assert torch.equal(one, other)


def test_training_is_the_same_as_by_messages():
    """Catches buckets that get in each other's way in the memory, and a stream that does not wait for backward."""
    run_ranks(train, 3, timeout=100)
