"""On NCCL: streams instead of threads, no wait of the host, and memory that lives as long as any stream uses it.

NCCL wants a GPU for each rank, so there is one rank. Its groups are real, and nothing is bypassed: the routines know no special
case of one rank, and the algorithms, which have nothing to send then, are told that there are two.
"""

import contextlib
import json
import tempfile
from collections import Counter
from datetime import timedelta
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import ProfilerActivity, profile, record_function

from helpers.models import GivenGradients, assert_gradients, few_kinds
from helpers.ranks import load_module, own_threads, run_ranks
from helpers.sequences import failures_of
from helpers.tensors import CODECS, DTYPES, assert_same_bits, awkward, normal
from lightning_accel import AsyncAverage, ByteGrad, Decentralized, GradientAllReduce, QAdam, QAdamAlgorithm, Replica
from lightning_accel.background.comm_queue import Step
from lightning_accel.background.communicator import Communicator
from lightning_accel.collectives.message_plan import TwoShotPlan, pieces_of
from lightning_accel.collectives.two_shot import compressed_all_reduce_steps
from lightning_accel.compression import operations
from lightning_accel.compression.block_layout import Layout
from lightning_accel.compression.codecs import NEEDING_FEEDBACK
from lightning_accel.compression.error_feedback import Feedback, Residuals
from lightning_accel.optim import Phase
from lightning_accel.reference.collectives import compressed_all_reduce as specified
from lightning_accel.transport.gloo import backend_of
from lightning_accel.transport.group import Group
from lightning_accel.transport.scratch import Scratch
from lightning_accel.transport.topology import discover

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU"),
    pytest.mark.timeout(300),  # all checks at once
]

TIMEOUT = timedelta(seconds=30)

SLEEP_CYCLES = 400_000_000
"""A fifth of a second or more, on a stream of a GPU: longer than the host takes for what a check does meanwhile."""


def open_communicator(device):
    numbered = torch.empty(0, device=device).device
    return Communicator("test", None, numbered, TIMEOUT, discover(dist.group.WORLD))


def sleep(device):
    """Keeps the current stream busy."""
    if device != "cpu":
        torch.cuda._sleep(SLEEP_CYCLES)


def stream_of(device):
    return torch.cuda.current_stream() if device != "cpu" else None


class Tensor:
    """One to be all_reduced, its plan as for several ranks, and what the CPU's codecs make of it."""

    def __init__(self, codec, dtype, seed, device):
        values = torch.cat([normal(5000, dtype, seed), awkward(dtype, seed), normal(7, dtype, seed + 1)])
        numels = [5000, values.numel() - 5007, 7]
        places = [(0, 0), (1, 5000), (2, values.numel() - 7)]
        # The form with all steps, which two ranks do not need and more do.
        pieces = pieces_of(Layout(numels, 1), places)
        self.plan = TwoShotPlan.build(codec, dtype, pieces, 1, 0, scatter=True)
        self.on_cpu = values
        self.on_device = values.to(device, copy=True)
        residuals = [torch.randn(values.numel(), generator=torch.Generator().manual_seed(seed)) for _ in range(2)]
        with_feedback = codec in NEEDING_FEEDBACK
        self.feedback_on_cpu = feedback(residuals, "cpu") if with_feedback else None
        self.feedback = feedback(residuals, device) if with_feedback else None

    def expect(self):
        """Does on the CPU, without a group, what the routine is to do."""
        plan, kept, values = self.plan, self.feedback_on_cpu, self.on_cpu
        message = torch.zeros(plan.stride_bytes, dtype=torch.uint8)
        mean = torch.zeros_like(message)
        worker, server = (kept.worker, kept.server) if kept else (None, None)
        operations.encode(plan.everything, values, message, worker)
        of_messages = {"count": 1, "stride_bytes": plan.stride_bytes, "divisor": 3.0}
        operations.decode_sum_encode(plan.own, message, mean, **of_messages, residuals=server)
        operations.decode(plan.everything, mean, values)

    def check(self, what):
        assert_same_bits(self.on_device, self.on_cpu, what)
        if self.feedback is not None:
            for kind in ("worker", "server"):
                got, wanted = getattr(self.feedback, kind).updated, getattr(self.feedback_on_cpu, kind).updated
                assert_same_bits(got, wanted, f"{what}, residuals of the {kind}")


def feedback(residuals, device):
    made = [Residuals(old.to(device), torch.zeros_like(old, device=device)) for old in residuals]
    return Feedback(*made)


def two_shot(rank, world_size, device):
    """Catches a routine that skips a phase where there is one rank, a collective that NCCL takes otherwise than gloo, and
    codecs that are enqueued on another stream than the messages: a NaN, a rounding or a residual differs."""
    first, second = Group(dist.new_group()), Group(dist.new_group())
    for codec in CODECS:
        for dtype in DTYPES:
            tensor, scratch = Tensor(codec, dtype, 1, device), Scratch()
            arguments = tensor.on_device, tensor.plan, first, second, scratch
            steps = compressed_all_reduce_steps(*arguments, divisor=3.0, feedback=tensor.feedback)
            assert sum(1 for _ in steps) == len(tensor.plan.phases) - 1 == 2
            tensor.expect()
            tensor.check(f"{codec}, {dtype}")


def queues(rank, world_size, device):
    """Catches work on the training stream or by a Python thread, buckets that share memory while both are under way, a stage
    that does not wait for the one before, and a training stream that reads before the last one has written."""
    communicator = open_communicator(device)
    groups = "all", "all", "none"
    opened = [communicator.open_queue(name) for name in groups]
    kept = [Scratch() for _ in range(5)]
    ran_on = [[] for _ in opened]

    def noted(place, step):
        def run():
            ran_on[place].append(stream_of(device))
            sleep(device) if place == 0 and len(ran_on[0]) == 1 else None
            step()

        return run

    for round_ in range(3):
        tensors = [Tensor("int4" if k % 2 else "int8", torch.float32, 10 * round_ + k, device) for k in range(len(kept))]
        futures = []
        for k, (tensor, scratch) in enumerate(zip(tensors, kept, strict=True)):
            arguments = tensor.on_device, tensor.plan, opened[0].group, opened[1].group, scratch
            steps = compressed_all_reduce_steps(*arguments, divisor=3.0, feedback=tensor.feedback)
            run = partial(next, steps, None)
            parts = [Step(name, opened[k], noted(k, run)) for k, name in enumerate(tensor.plan.phases)]
            futures.append(communicator.submit(f"bucket {k}", tensor.on_device, *parts))
        if device != "cpu":
            assert not own_threads()
        communicator.wait()
        for k, (tensor, future) in enumerate(zip(tensors, futures, strict=True)):
            assert future.wait() is tensor.on_device
            tensor.expect()
            tensor.check(f"round {round_}, bucket {k}")
    if device != "cpu":
        streams = [queue.stream for queue in opened]
        assert len({stream.cuda_stream for stream in (*streams, stream_of(device))}) == 1 + len(streams)
        for stream, used in zip(streams, ran_on, strict=True):
            assert set(used) == {stream}
    communicator.close()


def order_of_streams(rank, world_size, device):
    """Catches a queue that begins before the training stream has written, a stage that begins before the one before has, and
    a result that is delivered before the last stage has written: each of them is slow here."""
    communicator = open_communicator(device)
    one, other = communicator.open_queue("none"), communicator.open_queue("none")
    tensor, seen = torch.zeros(1000, device=device), torch.zeros(1000, device=device)

    def first():
        seen.copy_(tensor)
        sleep(device)
        tensor.mul_(2)

    def second():
        tensor.add_(1)
        sleep(device)
        tensor.mul_(10)

    for value in (1.0, 2.0):
        sleep(device)
        tensor.fill_(value)
        result = communicator.submit("bucket", tensor, Step("first", one, first), Step("second", other, second)).wait().clone()
        assert_same_bits(seen, torch.full((1000,), value), "what the first stage has read")
        assert_same_bits(result, torch.full((1000,), 10 * (2 * value + 1)), "what the training stream has read")
    communicator.close()


NUMEL = 32 * 2**20
"""Bytes that have a segment of the allocator for themselves: who asks for as many next gets the same, once it is given back."""


def submit_and_forget(kind, communicator, queue, seen):
    """Lets a queue read memory, late, and gives the memory back at once; its address is all that is left."""
    device, scratch = seen.device.type, Scratch()
    memory = scratch.bytes("memory", NUMEL, seen.device) if kind == "scratch" else torch.empty_like(seen)
    memory.fill_(1)
    tensor = torch.zeros(1, device=device) if kind == "scratch" else memory

    def read():
        sleep(device)
        seen.copy_(memory)

    communicator.submit("bucket", tensor, Step("read", queue, read))
    scratch.clear([queue.stream] if queue.stream is not None else [])
    return memory.data_ptr()


def keeps_values(kind, device):
    """Whether a queue still reads what was there, though the training stream has asked for as much memory and filled it."""
    communicator = open_communicator(device)
    queue = communicator.open_queue("none")
    seen = torch.zeros(NUMEL, dtype=torch.uint8, device=device)
    if device != "cpu":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    address = submit_and_forget(kind, communicator, queue, seen)
    pressing = torch.full((NUMEL,), 77, dtype=torch.uint8, device=device)
    if device != "cpu":
        torch.cuda.current_stream().synchronize()
        is_in_time = not queue.stream.query()
        assert is_in_time or pressing.data_ptr() != address, "the queue had read before the memory was overwritten"
        torch.cuda.synchronize()
    communicator.wait()
    communicator.close()
    return bool((seen == 1).all())


def lifetimes(rank, world_size, device):
    """Catches a `record_stream` that is missing where a queue takes up a tensor, or where scratch memory is given back: the
    allocator hands memory out anew while a queue's stream has yet to read it. Without `record_stream` the values are lost, which
    shows that the pressure is real."""
    for kind in ("tensor", "scratch"):
        assert keeps_values(kind, device), kind
        if device != "cpu":
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: None)
                assert not keeps_values(kind, device), f"{kind}: no pressure"


@contextlib.contextmanager
def refusing_to_wait(device):
    """Inside, torch raises where the host would wait for the GPU."""
    if device == "cpu":
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        with pytest.raises(RuntimeError, match="synchroniz"):
            torch.zeros(1, device=device).item()
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


class Training:
    """Steps of a perceptron by an algorithm that is told of a second rank, so that it has somebody to send to; None is DDP's."""

    def __init__(self, algorithm, device, width=300, depth=3, batch=32, bucket_cap_mb=0.1):
        torch.manual_seed(0)
        layers = [layer for _ in range(depth) for layer in (torch.nn.Linear(width, width), torch.nn.ReLU())]
        self.ddp = DistributedDataParallel(torch.nn.Sequential(*layers).to(device), bucket_cap_mb=bucket_cap_mb)
        make = QAdam if isinstance(algorithm, QAdamAlgorithm) else torch.optim.SGD
        options = {"warmup_steps": WARMUP_STEPS} if make is QAdam else {}
        self.optimizer = make(self.ddp.parameters(), lr=1e-3, **options)
        if algorithm is not None:
            self.replica = Replica(self.ddp, algorithm, [self.optimizer], timeout=TIMEOUT)
            self.replica.communicator.world_size = 2
        self.inputs = torch.randn(batch, width, device=device)

    def forward(self):
        return self.ddp(self.inputs).square().mean()

    def steps(self, count):
        for _ in range(count):
            loss = self.forward()
            self.optimizer.zero_grad()  # where Lightning does it
            loss.backward()
            self.optimizer.step()


WARMUP_STEPS = 9
SETTLING_STEPS = 4
"""In them DDP rebuilds its buckets, memory and plans are made, and kernels are loaded."""


def no_host_waits(rank, world_size, device):
    """Catches a value that is read back, a copy from memory that is not pinned, and an index by a mask, in each phase."""
    for algorithm in (
        GradientAllReduce(),
        GradientAllReduce(hierarchical=True),
        ByteGrad("int8"),
        ByteGrad("int8", hierarchical=True),
        QAdamAlgorithm("int8"),
    ):
        training = Training(algorithm, device)
        training.steps(SETTLING_STEPS)
        with refusing_to_wait(device):
            training.steps(3)
        if isinstance(algorithm, QAdamAlgorithm):
            assert training.optimizer.phase is Phase.WARMUP
            training.steps(WARMUP_STEPS)  # ranks agree that it is over, which waits, once
            assert training.optimizer.phase is Phase.COMPRESSED
            with refusing_to_wait(device):
                training.steps(3)
        assert training.replica.statistics.communication_seconds > 0, "bypassed"
        if device != "cpu":
            assert not own_threads()
        training.replica.close()


def buckets(rank, world_size, device):
    """Catches a bucket that DDP takes up before the queues have written it, or that they read before backward has."""
    for codec in ("int8", "sign", "none"):
        ddp = DistributedDataParallel(GivenGradients(few_kinds(0)).to(device), bucket_cap_mb=0.02)
        replica = Replica(ddp, ByteGrad(codec, error_feedback=False), timeout=TIMEOUT)
        replica.communicator.world_size = 2
        for step in range(4):
            given = few_kinds(0, step)
            ddp.zero_grad()
            ddp(given).backward()
            assert_gradients(ddp.module, [specified([gradient], codec, 1) for gradient in given], f"{codec}, step {step}")
        replica.close()


def weights(rank, world_size, device):
    """Catches weights that a queue takes before the optimizer has stepped, or that come back after backward has begun to need
    them: an exchange among the one rank there is changes nothing."""
    training, alone = Training(Decentralized(), device), Training(None, device)
    for step in range(6):
        training.steps(1)
        alone.steps(1)
        if step == 3:
            training.replica.consensus()
        for k, (ours, theirs) in enumerate(zip(training.ddp.parameters(), alone.ddp.parameters(), strict=True)):
            assert_same_bits(ours, theirs, f"step {step}, parameter {k}")
    assert training.replica.statistics.communication_seconds > 0, "bypassed"
    training.replica.close()


def async_buffers(rank, world_size, device):
    """Catches averaging by NCCL, whose kernels a thread of its own would enqueue between training's in any order, and memory
    that is not pinned, from which copies wait."""
    training = Training(AsyncAverage(), device)
    meetings = training.replica.algorithm.meetings
    assert backend_of(meetings.queue.group.process_group, torch.device("cpu")) == "gloo"
    if device != "cpu":
        assert all(tensor.is_pinned() for tensor in (*meetings.contributions, *meetings.corrections))
    training.replica.close()


def traced(work, device):
    """What happened on host and GPU while `work` ran, as the profiler's trace has it."""
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device != "cpu" else [])]
    with tempfile.TemporaryDirectory() as folder:
        with profile(activities=activities) as profiler:
            work()
            if device != "cpu":
                torch.cuda.synchronize()
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        return json.loads(path.read_text())["traceEvents"]


def overlap(rank, world_size, device):
    """Catches codecs on the training stream, where they would delay backward, buckets that are sent when backward is over, and
    waits of the host that torch's own check does not see."""
    size = {"width": 2048, "depth": 16, "batch": 4096, "bucket_cap_mb": 8} if device != "cpu" else {}
    training = Training(ByteGrad("int8"), device, **size)
    training.steps(12)  # in the first ten DDP reads its timers, which waits
    loss = training.forward()
    if device != "cpu":
        torch.cuda.synchronize()
    check_overlap(traced(loss.backward, device), device)

    def steps():
        with record_function("steps"):
            training.steps(3)

    check_host(traced(steps, device))
    training.replica.close()


def check_overlap(events, device="cuda"):
    """Codecs ran on other streams than backward, and one at least ran between backward's first and last kernel."""
    kernels = [event for event in events if event.get("cat") == "kernel"]
    if device == "cpu":
        assert not kernels
        return
    coded = [event for event in kernels if "accel" in event["name"] and "code" in event["name"]]
    busy = Counter()
    for event in kernels:
        if event not in coded:
            busy[event["args"]["stream"]] += event["dur"]
    ((training_stream, _),) = busy.most_common(1)
    assert {event["args"]["stream"] for event in coded}.isdisjoint({training_stream})
    assert len({event["args"]["stream"] for event in coded}) == 2, "one stream for each of two stages"
    # Products of matrices: what copies gradients out of buckets comes after all codecs in any case, and is short.
    on_it = [event for event in kernels if event["args"]["stream"] == training_stream]
    backward = [event for event in on_it if event["dur"] > max(other["dur"] for other in on_it) / 4]
    first, last = min(event["ts"] for event in backward), max(event["ts"] + event["dur"] for event in backward)
    beside = [event for event in coded if first < event["ts"] and event["ts"] + event["dur"] < last]
    assert beside, f"backward ran from {first} to {last}, codecs at {[event['ts'] for event in coded]}"


def check_host(events):
    """No call of CUDA's that waits, while the steps ran."""
    (steps,) = (event for event in events if event["name"] == "steps" and event.get("cat") == "user_annotation")
    waits = "cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cudaMemcpy"
    waited = [event["name"] for event in events if event["name"] in waits and 0 <= event["ts"] - steps["ts"] <= steps["dur"]]
    assert not waited


CHECKS = {
    check.__name__: check
    for check in (
        two_shot, queues, order_of_streams, lifetimes, buckets, weights, async_buffers, no_host_waits, overlap,
    )
}  # fmt: skip


def run(rank, world_size, names, begin, device):
    for name in names:
        begin(name)
        CHECKS[name](rank, world_size, device)


@pytest.fixture(scope="module")
def failures():
    return failures_of(run, CHECKS, 1, "cuda", timeout=120, backend="nccl")


@pytest.mark.parametrize("name", CHECKS)
def test_one_rank(failures, name):
    """What each check catches, its docstring says."""
    assert failures.get(name) is None, failures[name]


algorithms = load_module("algorithms_cuda", str(Path(__file__).with_name("test_algorithms_cuda.py")))


def run_two(rank, world_size, names):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NCCL_MULTI_RANK_GPU_ENABLE", "1")
        algorithms.run(rank, world_size, names, lambda name: None, "cuda")


@pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.nccl.version() < (2, 30), reason="this NCCL wants a GPU for each rank"
)
def test_two_ranks_that_share_a_gpu():
    """Catches messages that NCCL pairs up or orders otherwise than gloo."""
    names = ["gradient_allreduce: DDP", "bytegrad int8", "bytegrad sign with feedback", "qadam int8"]
    names += ["decentralized shift_one", "low_precision_decentralized"]
    run_ranks(run_two, 2, names, timeout=100, backend="nccl")
