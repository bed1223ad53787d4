"""All_reduces over shared memory, as far as they need no GPU: what is refused, and that ranks without one use messages.

native/tests/test_peers_emulated.cpp has what the kernel computes, tests/cuda/test_shared_memory_cuda.py the whole.
"""

import logging
from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

import lightning_accel as accel
from helpers.ranks import run_ranks
from lightning_accel import _native
from lightning_accel.background import pipeline
from lightning_accel.background.communicator import Communicator
from lightning_accel.collectives.message_plan import TwoShotPlan
from lightning_accel.collectives.shared_memory import PeerMemory
from lightning_accel.collectives.two_shot import compressed_all_reduce
from lightning_accel.compression.error_feedback import Feedback, Residuals
from lightning_accel.compression.plan import Plan
from lightning_accel.transport.group import Group
from lightning_accel.transport.scratch import Scratch
from lightning_accel.transport.topology import Topology

PLAN = Plan("int8", torch.float32, [0], [1000])
ROOM = _native.peer_memory_bytes(2, PLAN.wire_bytes)


def arguments(**changed):
    given = {
        "everything": PLAN.native,
        "own": PLAN.native,
        "stride_bytes": PLAN.wire_bytes,
        "is_whole": False,
        "everything_segments": 16,
        "own_segments": 16,
        "tensor": 16,
        "numel": 1000,
        "memory": [16, 32],
        "memory_bytes": ROOM,
        "rank": 1,
        "divisor": 2.0,
        "worker": (0, 0, 0),
        "server": (0, 0, 0),
        "failure": 16,
        "timeout_seconds": 1.0,
        "stream": 0,
    }
    return given | changed


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"memory": []}, "1 to 16 peers"),
        ({"memory": [16] * 17}, "1 to 16 peers"),
        ({"rank": 2}, "rank 2 of 2"),
        ({"memory": [16, 40]}, "rank 1's memory must lie at a multiple of 16"),
        ({"memory": [0, 16]}, "rank 0's memory must lie"),
        ({"own": Plan("none", torch.float32, [0], [1]).native}, "one codec and dtype"),
        ({"stride_bytes": PLAN.wire_bytes - 16}, "do not hold"),
        ({"stride_bytes": PLAN.wire_bytes + 8}, "do not hold"),
        ({"memory_bytes": ROOM - 16}, f"at least {ROOM} bytes, got {ROOM - 16}"),
        ({"memory_bytes": ROOM + 8}, "a multiple of 16 bytes"),
        ({"numel": 999}, "at least 1000 elements, got 999"),
        ({"tensor": 0}, "at least 1000 elements"),
        ({"worker": (16, 0, 1000)}, "need both memories"),
        ({"worker": (16, 16, 999), "server": (16, 16, 1000)}, "worker's residuals of at least 1000 elements, got 999"),
        ({"server": (16, 16, 1000)}, "both sides keep residuals"),
        ({"failure": 0}, "place for failures"),
        ({"timeout_seconds": 0.0}, "time to come"),
    ],
)
def test_what_would_corrupt_memory_is_refused(changed, message):
    """Catches a kernel that writes beyond a buffer of another size, in this process or in a peer."""
    with pytest.raises(ValueError, match=message):
        _native.peer_all_reduce(**arguments(**changed))


@pytest.mark.skipif(_native.CUDA_ARCHITECTURES != "", reason="this build has CUDA kernels: the addresses would be used")
def test_a_build_without_cuda_says_so():
    """Catches checks that refuse what is right."""
    with pytest.raises(ValueError, match="no CUDA kernels"):
        _native.peer_all_reduce(**arguments())


@pytest.mark.skipif(_native.CUDA_ARCHITECTURES != "", reason="this build has CUDA kernels: the addresses would be used")
def test_a_rank_that_sums_nothing_needs_no_residuals_there():
    """Catches a rank without blocks that is refused alone, while the others wait for it."""
    with pytest.raises(ValueError, match="no CUDA kernels"):
        _native.peer_all_reduce(**arguments(worker=(16, 16, 1000), own=Plan("int8", torch.float32, [], []).native))


def test_a_tensor_of_another_kind_is_refused():
    """Catches an address that goes to the kernel with a type, a place or strides that are not the plan's."""
    mapping = SimpleNamespace(buffer_ptrs=[16])
    peers = PeerMemory(Group(None), torch.zeros(ROOM, dtype=torch.uint8), mapping, timedelta(seconds=1))
    plan = TwoShotPlan(PLAN, PLAN, PLAN.wire_bytes, is_whole=True, own_numels=())
    for wrong in (torch.zeros(1000, dtype=torch.float64), torch.zeros(2, 500), torch.zeros(2000)[::2]):
        with pytest.raises(ValueError, match=r"tensor must be one-dimensional, contiguous, torch\.float32"):
            peers.all_reduce(wrong, plan, divisor=1)
    of_wrong_type = Residuals(torch.zeros(1000, dtype=torch.float64), torch.zeros(1000))
    with pytest.raises(ValueError, match="residuals must be one-dimensional, contiguous, float32 on cpu"):
        peers.all_reduce(torch.zeros(1000), plan, divisor=1, feedback=Feedback(of_wrong_type, of_wrong_type))


class ByMessages:
    """In the place of shared memory: the same all_reduce by messages, and a failure after `limit` of them."""

    def __init__(self, group, limit):
        self.group, self.limit = group, limit
        self.calls = self.aborts = self.closes = 0

    def all_reduce(self, tensor, plan, *, divisor, feedback=None):
        self.calls += 1
        compressed_all_reduce(tensor, plan, self.group, Scratch(), divisor=divisor, feedback=feedback)

    def check(self):
        if self.calls > self.limit:
            raise TimeoutError("rank 1 of 2 did not come")

    def abort(self):
        self.aborts += 1

    def close(self):
        self.closes += 1


def train_with(rank, n, limit):
    """Steps by messages, and by what stands in for shared memory; whether weights agree, and what happened to the latter."""
    made = []

    def stand_in(group, plans, device, timeout, *, is_one_node):
        assert is_one_node
        assert timeout.total_seconds() > 0
        assert max(plan.stride_bytes for plan in plans) >= 3 * 600
        made.append(ByMessages(group, limit))
        return made[0]

    pipeline.open_peer_memory = stand_in
    weights, failure = [], ""
    for shared_memory in (False, True):
        try:
            torch.manual_seed(0)
            model = torch.nn.Sequential(torch.nn.Linear(600, 3 * n), torch.nn.Linear(3 * n, 2))
            optimizer = torch.optim.SGD(model.parameters(), 0.1)
            options = {"codec": "int8", "error_feedback": True, "bucket_cap_mb": 0.001, "shared_memory": shared_memory}
            with accel.wrap(model, optimizer, "bytegrad", **options) as ddp:
                for step in range(6):
                    optimizer.zero_grad()
                    ddp(torch.randn(4, 600, generator=torch.Generator().manual_seed(100 * rank + step))).sum().backward()
                    optimizer.step()
                ddp.replica.consensus()
        except accel.CommunicationError as error:
            failure = str(error)
        weights.append([parameter.detach().clone() for parameter in model.parameters()])
        dist.barrier()
    same = all(torch.equal(one, other) for one, other in zip(*weights, strict=True))
    return same, failure, made[0].calls, made[0].aborts, made[0].closes


def test_buckets_take_it():
    """Catches an algorithm that passes shared memory by, or does not know how many steps it takes."""
    for same, failure, calls, aborts, closes in run_ranks(train_with, 2, 1000):
        assert same
        assert failure == ""
        assert calls >= 4
        assert (aborts, closes) == (0, 1)


def test_its_failure_ends_training():
    """Catches a failure on a GPU that nobody looks for, in the last step too, and kernels that go on waiting."""
    for limit in (0, 3):
        for same, failure, calls, aborts, closes in run_ranks(train_with, 2, limit):
            assert not same
            assert "TimeoutError: rank 1 of 2 did not come" in failure
            assert calls == limit + 1
            assert aborts >= 1
            assert closes == 1


def fail_alone(rank, n):
    """What happens to what is watched, in order, where no other thread has to wait for anything."""
    happened = []

    class Noted:
        def check(self):
            pass

        def abort(self):
            happened.append("abort")

        def close(self):
            happened.append("close")

    communicator = Communicator("test", None, torch.device("cpu"), None, Topology(((0,),)))
    communicator.watch(Noted())
    communicator.fail(RuntimeError("it failed elsewhere"), "a bucket", torch.zeros(1))
    communicator.close()
    return happened


def test_a_failure_ends_waits_before_it_waits_for_them():
    """Catches a teardown that waits for a kernel which waits for a rank that is gone."""
    assert run_ranks(fail_alone, 1) == [["abort", "close"]]


class Messages(logging.Handler):
    def __init__(self):
        super().__init__()
        self.messages = []

    def emit(self, record):
        self.messages.append(record.getMessage().partition(": ")[2])


def train(rank, n):
    """Three steps, with shared memory asked for; weights, and what was said."""
    heard = Messages()
    logging.getLogger("lightning_accel").addHandler(heard)
    weights = []
    for shared_memory in (False, True):
        torch.manual_seed(0)
        model = torch.nn.Linear(600, 3)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with accel.wrap(model, optimizer, "bytegrad", shared_memory=shared_memory) as ddp:
            for step in range(3):
                optimizer.zero_grad()
                ddp(torch.randn(4, 600, generator=torch.Generator().manual_seed(100 * rank + step))).sum().backward()
                optimizer.step()
        weights.append(model.weight.detach().clone())
        dist.barrier()
    return [torch.equal(*weights), heard.messages]


def test_ranks_without_a_gpu_use_messages_and_say_so_once():
    """Catches a fallback that is silent, said by each rank, or not agreed on."""
    (same, said), (same_there, said_there) = run_ranks(train, 2)
    assert same
    assert same_there
    assert [message for message in said if "no memory is shared" in message] == [
        "no memory is shared between GPUs, so codes travel as messages: the tensors are not on a GPU, or this build has no CUDA "
        "kernels"
    ]
    assert not [message for message in said_there if "no memory is shared" in message]
