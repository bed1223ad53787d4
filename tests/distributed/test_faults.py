"""What a failure does: every rank ends soon, with our own error, and nobody has stepped with a wrong gradient."""

import ctypes
import os
import re
import signal
import sys
import threading
import time
from datetime import timedelta
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from helpers import programs
from helpers.models import GivenGradients, few_kinds
from helpers.ranks import own_threads, run_ranks
from helpers.training import TIMEOUT, Training
from lightning_accel import ByteGrad, CommunicationError, GradientAllReduce
from lightning_accel.background import comm_queue, communicator, failure
from lightning_accel.compression import operations
from lightning_accel.reference.bytegrad import bytegrad
from lightning_accel.reference.gradient_allreduce import gradient_allreduce
from lightning_accel.transport.group import Group

MOMENTS_SECONDS = 8.0
"""What "in moments, not at the timeout" means on a busy machine; alone it takes a tenth of a second."""

FAULTY_STEP = 3
STEPS = 6
RATE = 0.5


class FailingTraining(Training):
    """Steps with given gradients until they fail, the clock, and the weights that the specification says they lead to."""

    def __init__(self, rank, world_size, algorithm, *, timeout=TIMEOUT, nodes=None):
        self.algorithm = algorithm
        self.gradients = [[few_kinds(r, step) for r in range(world_size)] for step in range(STEPS)]
        # From 0.02 megabytes on a bucket is closed: three of them.
        options = {"timeout": timeout, "nodes": nodes, "bucket_cap_mb": 0.02}
        super().__init__(GivenGradients(self.gradients[0][0]), algorithm, partial(torch.optim.SGD, lr=RATE), **options)
        self.steps = 0

    def run(self, before_backward=lambda step: None):
        """All steps; the error that ends them, and the seconds its step took."""
        for step in range(STEPS):
            started = time.perf_counter()
            try:
                self.optimizer.zero_grad()
                loss = self.ddp(self.gradients[step][self.rank])
                before_backward(step)
                loss.backward()
                self.optimizer.step()
            except CommunicationError as error:
                return error, time.perf_counter() - started
            self.steps += 1
        raise AssertionError("nothing failed")

    def check_weights(self, reference):
        """The weights are those of the steps that were taken, and of no other."""
        expected = GivenGradients(self.gradients[0][0])
        optimizer = torch.optim.SGD(expected.parameters(), lr=RATE)
        for step in range(self.steps):
            for parameter, gradient in zip(expected.parameters(), reference(self.gradients[step]), strict=True):
                parameter.grad = gradient
            optimizer.step()
        self.assert_weights(expected.parameters(), f"after {self.steps} steps")

    def check_end(self):
        """The error comes again at the next forward; closing is quick, complete, and may be repeated."""
        with pytest.raises(CommunicationError):
            self.ddp(self.gradients[0][self.rank])
        started = time.perf_counter()
        self.replica.close()
        self.replica.close()
        assert time.perf_counter() - started < MOMENTS_SECONDS
        assert not own_threads()


def reference_of(algorithm, nodes=None):
    if isinstance(algorithm, ByteGrad):
        return lambda gradients: bytegrad(gradients, algorithm.codec, nodes=nodes)
    return lambda gradients: gradient_allreduce(gradients, nodes=nodes)


def check_message(error, algorithm, rank, world_size):
    pattern = rf"{algorithm.name}: bucket \d+ failed on rank {rank} of {world_size}: .*No rank steps with what has arrived"
    assert re.search(pattern, str(error), re.DOTALL), str(error)
    assert error.__cause__ is not None


def killed(rank, world_size, algorithm, nodes):
    training = FailingTraining(rank, world_size, algorithm, nodes=nodes)

    def kill(step):
        if step == FAULTY_STEP and rank == world_size - 1:
            training.model.p1.register_hook(lambda gradient: os.kill(os.getpid(), signal.SIGKILL))

    error, seconds = training.run(kill)
    assert seconds < MOMENTS_SECONDS, seconds
    check_message(error, algorithm, rank, world_size)
    assert training.steps == FAULTY_STEP
    training.check_weights(reference_of(algorithm, nodes))
    training.check_end()
    return True


# From three ranks on the backend's own all_reduce sums in an order of its own: no bits to compare.
@pytest.mark.parametrize(("world_size", "algorithm"), [(2, ByteGrad()), (2, GradientAllReduce()), (3, ByteGrad())])
def test_a_killed_rank_ends_the_others(algorithm, world_size):
    """Catches a hang in backward, past every timeout, when a peer is gone; and a step with what had arrived."""
    results = run_ranks(killed, world_size, algorithm, None, lost={world_size - 1})
    assert results == [True] * (world_size - 1) + [None]


def test_a_killed_rank_ends_those_that_share_no_group_with_it():
    """As above: rank 0 talks to ranks 1 and 2 only, and hears of rank 3 because these two close their connections."""
    nodes = ((0, 1), (2, 3))
    results = run_ranks(killed, 4, ByteGrad(hierarchical=True), nodes, lost={3})
    assert results == [True] * 3 + [None]


def stopped(rank, world_size, algorithm, timeout_seconds):
    training = FailingTraining(rank, world_size, algorithm, timeout=timedelta(seconds=timeout_seconds))

    def stop(step):
        if step == FAULTY_STEP and rank == world_size - 1:
            os.kill(os.getpid(), signal.SIGSTOP)

    error, seconds = training.run(stop)
    assert timeout_seconds * 0.9 < seconds < timeout_seconds + failure.GRACE_SECONDS + MOMENTS_SECONDS, seconds
    check_message(error, algorithm, rank, world_size)
    training.check_weights(reference_of(algorithm))
    training.check_end()
    return True


@pytest.mark.parametrize("algorithm", [ByteGrad(), GradientAllReduce()], ids=lambda algorithm: algorithm.name)
def test_a_rank_that_is_stuck_ends_the_others_at_their_timeout(algorithm):
    """Catches a wait without a bound: the stuck rank's connections stay open."""
    assert run_ranks(stopped, 2, algorithm, 2.0, lost={1}) == [True, None]


def break_on_one_rank(rank, world_size, algorithm, operation, at_call, nodes):
    training = FailingTraining(rank, world_size, algorithm, nodes=nodes)
    module = dist if operation == "all_reduce" else operations
    original, calls = getattr(module, operation), []

    def broken(*args, **options):
        calls.append(operation)
        if len(calls) == at_call:
            raise ValueError("injected")
        return original(*args, **options)

    def inject(step):
        if step == FAULTY_STEP and rank == 1:
            setattr(module, operation, broken)

    error, seconds = training.run(inject)
    setattr(module, operation, original)
    dist.barrier()  # nobody closes before all have failed: closing would end the others too
    assert seconds < MOMENTS_SECONDS, seconds
    check_message(error, algorithm, rank, world_size)
    if rank == 1:
        assert training.steps == FAULTY_STEP
        assert isinstance(error.__cause__, ValueError)
    # After the last message others may have had all they need: they are one step ahead, with a right gradient.
    assert training.steps in (FAULTY_STEP, FAULTY_STEP + 1)
    training.check_weights(reference_of(algorithm, nodes))
    training.check_end()
    # Our groups were our own: the default one is as good as before.
    total = torch.tensor([float(rank)])
    dist.all_reduce(total)
    assert total.item() == sum(range(world_size))
    return True


@pytest.mark.parametrize("operation", ["encode", "decode_sum_encode", "decode"])
@pytest.mark.parametrize("at_call", [1, 2])
@pytest.mark.parametrize("world_size", [2, 3])
def test_one_bucket_that_fails_on_one_rank_ends_all_ranks(operation, at_call, world_size):
    """Catches peers that pair later collectives up wrongly, and train on with a wrong gradient."""
    results = run_ranks(break_on_one_rank, world_size, ByteGrad(), operation, at_call, None)
    assert results == [True] * world_size


@pytest.mark.parametrize("operation", ["encode", "decode_accumulate", "decode_sum_encode", "decode"])
def test_one_bucket_that_fails_between_nodes_ends_all_ranks(operation):
    """As above, with groups of nodes and peers: a rank that shares no group with the failed one must hear of it too."""
    nodes = ((0, 1), (2, 3))
    results = run_ranks(break_on_one_rank, 4, ByteGrad(hierarchical=True), operation, 2, nodes)
    assert results == [True] * 4


@pytest.mark.parametrize("at_call", [1, 2])
def test_an_all_reduce_that_fails_on_one_rank_ends_all_ranks(at_call):
    """As above, where the backend's own all_reduce carries the bucket."""
    assert run_ranks(break_on_one_rank, 2, GradientAllReduce(), "all_reduce", at_call, None) == [True] * 2


def break_in_hook(rank, world_size):
    training = FailingTraining(rank, world_size, ByteGrad())
    original, calls = training.replica.algorithm.reduce_gradients, []

    def broken(bucket, label):
        calls.append(label)
        if len(calls) == 2:
            raise TypeError("injected")
        return original(bucket, label)

    def inject(step):
        if step == FAULTY_STEP and rank == 0:
            training.replica.algorithm.reduce_gradients = broken

    error, seconds = training.run(inject)
    dist.barrier()
    assert seconds < MOMENTS_SECONDS, seconds
    check_message(error, training.algorithm, rank, world_size)
    assert training.steps == FAULTY_STEP
    training.check_weights(reference_of(training.algorithm))
    training.check_end()


def test_an_algorithm_that_raises_on_one_rank_ends_all_ranks():
    """Catches an exception inside of DDP's hook, which torch would turn into a cast error, or a hang of the peers."""
    run_ranks(break_in_hook, 2)


class UsersError(Exception):
    pass


def leave(rank, world_size):
    training = FailingTraining(rank, world_size, ByteGrad())

    def fail(step):
        if step == FAULTY_STEP and rank == 1:
            raise UsersError

    started = time.perf_counter()
    if rank == 1:
        with pytest.raises(UsersError):
            training.run(fail)
        training.replica.close()
        return
    error, _ = training.run()
    assert time.perf_counter() - started < MOMENTS_SECONDS
    check_message(error, training.algorithm, rank, world_size)
    training.check_weights(reference_of(training.algorithm))
    training.check_end()


def test_a_rank_that_leaves_with_its_own_error_ends_the_others():
    """Catches a close that keeps connections open: peers would wait for their timeout."""
    run_ranks(leave, 2)


def hang(rank, world_size):
    communicator.GRACE_SECONDS = comm_queue.GRACE_SECONDS = 1.0
    training = FailingTraining(rank, world_size, ByteGrad(), timeout=timedelta(seconds=2))
    decode, released = operations.decode, threading.Event()

    def stuck(*args):
        released.wait()
        return decode(*args)

    def inject(step):
        if step == FAULTY_STEP and rank == 1:
            operations.decode = stuck

    error, seconds = training.run(inject)
    assert seconds < 2 + 1 + MOMENTS_SECONDS, seconds
    check_message(error, training.algorithm, rank, world_size)
    assert isinstance(error.__cause__, TimeoutError) == (rank == 1)
    training.check_weights(reference_of(training.algorithm))
    started = time.perf_counter()
    training.replica.close()
    assert time.perf_counter() - started < 2 * 1 + MOMENTS_SECONDS
    released.set()


def test_a_procedure_that_never_ends_does_not_hold_its_own_rank():
    """Catches a wait, and a close, that trust the backend to time out: nothing of the backend runs here."""
    run_ranks(hang, 2)


def interrupt(rank, world_size, algorithm, folder):
    training = FailingTraining(rank, world_size, algorithm)
    heard, waits = Path(folder) / "heard", Path(folder) / "waits"
    if rank == 0:
        (Path(folder) / "pid").write_text(str(os.getpid()))
        try:
            training.run(lambda step: waits.touch() if step == FAULTY_STEP else None)
        except KeyboardInterrupt:
            heard.write_text(f"{training.steps} steps")
        # The interpreter's own end, with its joins and destructors, which a rank else leaves out.
        ctypes.pythonapi.Py_Exit(0)

    def press(step):
        if step == FAULTY_STEP:
            raise UsersError

    with pytest.raises(UsersError):
        training.run(press)
    deadline = time.monotonic() + MOMENTS_SECONDS
    while not waits.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.5)  # rank 0 is in its backward, where it waits for this rank
    pid = int((Path(folder) / "pid").read_text())
    assert not heard.exists()
    os.kill(pid, signal.SIGINT)
    started = time.perf_counter()
    while programs.is_alive(pid) and time.perf_counter() - started < 20:
        time.sleep(0.01)
    seconds = time.perf_counter() - started
    assert heard.read_text() == f"{FAULTY_STEP} steps"
    training.replica.close()
    return seconds


@pytest.mark.parametrize("algorithm", [ByteGrad(), GradientAllReduce()], ids=lambda algorithm: algorithm.name)
def test_ctrl_c_ends_a_process_that_waits(algorithm, tmp_path):
    """Catches a wait inside of torch that Ctrl-C cannot reach, and an exit that joins a thread inside of a collective."""
    attempts = []
    while len(attempts) < 3 and not any(seconds < 2 for seconds in attempts):  # others may use the machine too
        folder = tmp_path / str(len(attempts))
        folder.mkdir()
        attempts.append(run_ranks(interrupt, 2, algorithm, str(folder), lost={0})[1])
    # Under two seconds on a machine at rest. A join in the exit takes five, and a wait that Ctrl-C does not reach thirty.
    assert min(attempts) < 4, attempts


SCRIPT = """
import sys
import torch
import torch.distributed as dist
from lightning_accel import ByteGrad, Replica

rank, store = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", store=dist.FileStore(store, 2), rank=rank, world_size=2)
ddp = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(100, 100))
optimizer = torch.optim.SGD(ddp.parameters(), lr=0.1)
replica = Replica(ddp, ByteGrad(), [optimizer])
for step in range(3):
    ddp(torch.ones(1, 100)).sum().backward()
    optimizer.step()
print("done", flush=True)
"""


def test_a_script_that_closes_nothing_ends(tmp_path):
    """Catches an interpreter that waits for our threads, or crashes under them, when a script just ends."""
    ranks = [programs.start(sys.executable, "-c", SCRIPT, rank, tmp_path / "store") for rank in range(2)]
    try:
        results = [rank.communicate(timeout=60) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
            rank.communicate()
    for rank, (output, errors) in zip(ranks, results, strict=True):
        assert output == "done\n", errors
        assert rank.returncode == 0, errors


def abort_groups(rank, world_size):
    group = Group(dist.new_group())
    awake = threading.Event()

    def wait_for_first_rank():
        with pytest.raises(RuntimeError):
            dist.irecv(torch.empty(1), group=group.process_group, group_src=0).wait()
        awake.set()

    if rank != 0:
        threading.Thread(target=wait_for_first_rank, daemon=True).start()
        time.sleep(0.2)
    dist.barrier()
    if rank == 2:
        group.abort()
        assert awake.wait(MOMENTS_SECONDS)
    dist.barrier()
    if rank == 0:
        group.abort()  # its connection to rank 2 is closed already, the one to rank 1 is not
    if rank == 1:
        assert awake.wait(MOMENTS_SECONDS)
    dist.barrier()  # nobody lets go of the group before: that would close its connections too
    return True


def test_an_aborted_group_wakes_own_threads_and_other_ranks():
    """Catches an abort that leaves connections open: whoever waits on them waits for the timeout."""
    assert run_ranks(abort_groups, 3) == [True] * 3
