"""Each algorithm on ranks that share a GPU: the bits of the specification, as on the CPU.

NCCL wants a GPU for each rank, so gloo carries what is sent, through pinned memory on the host. The checks are those of
tests/distributed, with models on the GPU.
"""

import contextlib
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from helpers.ranks import load_module
from helpers.sequences import failures_of
from lightning_accel import Decentralized, LowPrecisionDecentralized
from lightning_accel.background.communicator import Communicator
from lightning_accel.transport.topology import discover

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU"),
    pytest.mark.timeout(300),  # all checks at once
]

TIMEOUT = timedelta(seconds=30)

DISTRIBUTED = Path(__file__).parents[1] / "distributed"


def on_cpu(name):
    return load_module(f"{name}_on_cpu", str(DISTRIBUTED / f"test_{name}.py"))


gradient_allreduce, bytegrad, error_feedback = on_cpu("gradient_allreduce"), on_cpu("bytegrad"), on_cpu("error_feedback")
qadam, decentralized, ring = on_cpu("qadam"), on_cpu("decentralized"), on_cpu("low_precision_decentralized")
async_ = on_cpu("async")


def pairs(world_size):
    """Nodes of two ranks."""
    return tuple((r, r + 1) for r in range(0, world_size, 2))


def check_async(rank, world_size, device):
    averagings, spread = async_.follow_schedule(rank, world_size, device)
    assert averagings == sum(event == ("average",) for event in async_.SCHEDULE)
    assert spread == [0.0] * 4


def read_on_another_stream(rank, world_size, device):
    """Catches a result that is delivered while gloo still copies it to the GPU: no other stream than one waits for that."""
    tensors = [torch.full((2_000_000,), rank + k, device=device) for k in range(10)]
    communicator = Communicator("test", None, tensors[0].device, TIMEOUT, discover(dist.group.WORLD))
    queue = communicator.open_queue("all")
    futures = [communicator.all_reduce(f"bucket {k}", tensor, queue) for k, tensor in enumerate(tensors)]
    communicator.wait()
    with torch.cuda.stream(torch.cuda.Stream(priority=-1)) if device != "cpu" else contextlib.nullcontext():
        for k, (future, tensor) in enumerate(zip(futures, tensors, strict=True)):
            future.wait()
            assert (tensor == sum(range(world_size)) + k * world_size).all(), k
    communicator.close()


def coded(codec):
    options = [{"bucket_cap_mb": 1}, {"bucket_cap_mb": 0.02, "gradient_as_bucket_view": True}]
    return lambda rank, n, device: bytegrad.check(rank, n, (codec,), True, options, device)


def with_feedback(codec):
    return lambda rank, n, device: error_feedback.check(rank, n, codec, None, device)


def frozen_variance(codec, decoupled=False):
    return lambda rank, n, device: qadam.check(rank, n, codec, None, 0.1, decoupled, None, device)


def exchanging(check, *cases):
    return lambda rank, n, device: check(rank, n, [(options, *rest) for options, *rest in cases], device)


CHECKS = {
    "gloo": read_on_another_stream,
    "gradient_allreduce: DDP": gradient_allreduce.compare_gradients,
    "gradient_allreduce: the mean": gradient_allreduce.compare_specification,
    "gradient_allreduce by nodes": lambda rank, n, device: gradient_allreduce.check_nodes(rank, n, pairs(n), device),
    "bytegrad int8": coded("int8"),
    "bytegrad minmax_uint8": coded("minmax_uint8"),
    "bytegrad int4": coded("int4"),
    "bytegrad none": coded("none"),
    "bytegrad int4 with feedback": with_feedback("int4"),
    "bytegrad sign with feedback": with_feedback("sign"),
    "bytegrad sign by nodes": lambda rank, n, device: error_feedback.check(rank, n, "sign", pairs(n), device),
    "qadam int8": frozen_variance("int8"),
    "qadam sign": frozen_variance("sign", decoupled=True),
    "qadam by nodes": lambda rank, n, device: qadam.check(rank, n, "int4", None, 0.0, False, pairs(n), device),
    "decentralized all": exchanging(decentralized.check, (Decentralized(), 2, None, {"gradient_as_bucket_view": True})),
    "decentralized shift_one": exchanging(decentralized.check, (Decentralized("shift_one", 2), 1, None, {})),
    "low_precision_decentralized": exchanging(ring.check, (LowPrecisionDecentralized(), 1, None, 7)),
    "low_precision_decentralized bf16": exchanging(ring.check, (LowPrecisionDecentralized("bf16", 3), 2, None, 7)),
    "async": check_async,  # the last: it replaces `weight_means.mean`
}


def run(rank, world_size, names, begin, device):
    for name in names:
        begin(name)
        CHECKS[name](rank, world_size, device)


@pytest.fixture(scope="module", params=[2, 4], ids="{} ranks".format)
def failures(request):
    return failures_of(run, CHECKS, request.param, "cuda", timeout=140)


@pytest.mark.parametrize("name", CHECKS)
def test_every_rank_equals_the_reference(failures, name):
    """Catches a host buffer that is read or written while the GPU still copies, copies that go the wrong way, a queue whose
    stream does not wait for backward or that backward does not wait for, and kernels that round otherwise than the CPU's."""
    assert failures.get(name) is None, failures[name]
