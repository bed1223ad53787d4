"""The plain PyTorch API, in processes of their own, as users start them."""

import copy
import gc
import io
import logging
import pickle
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

import lightning_accel as accel
from helpers import programs
from helpers.ranks import own_threads, run_ranks, run_script
from lightning_accel.background.comm_queue import Step

EXAMPLE = Path(__file__).parents[2] / "examples" / "plain_pytorch.py"
STEP = EXAMPLE.with_name("steps") / "3_torchrun_snapshots.py"


def torchrun(port, *arguments):
    return programs.run(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", 2, "--master-port", port, *arguments)


def test_the_example_learns_and_goes_on_after_a_stop(tmp_path, port):
    """Catches a resumed run that differs from an undisturbed one: weights, optimizer, order of images, state."""
    whole = torchrun(port, EXAMPLE, "--epochs", 12, "--checkpoint", tmp_path / "whole.pt")
    assert whole.returncode == 0, whole.stderr
    assert "[rank 0] test accuracy 9" in whole.stdout
    assert "[rank 1]" not in whole.stdout
    for epochs in (5, 12):
        said, _ = run_script(EXAMPLE, 2, "--epochs", epochs, "--checkpoint", tmp_path / "parts.pt", folder=tmp_path)
    assert "resuming after epoch 5" in said
    one, other = (torch.load(tmp_path / name, weights_only=True) for name in ("whole.pt", "parts.pt"))
    for name, weight in one["model"].items():
        assert torch.equal(weight, other["model"][name]), name
    assert one["lightning_accel"]["replicas"] == other["lightning_accel"]["replicas"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["parts.pt", "whole.pt"]


DIES_ONCE = """
import os, runpy, signal, sys
import lightning_accel as accel
save = accel.save_checkpoint

def save_and_die(path, model, optimizer, *, epoch):
    save(path, model, optimizer, epoch=epoch)
    if epoch == 3 and accel.get_rank() == 1 and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        os.kill(os.getpid(), signal.SIGKILL)

accel.save_checkpoint = save_and_die
sys.argv[0] = {example!r}
runpy.run_path({example!r}, run_name="__main__")
"""


def test_a_killed_rank_is_started_again_and_nothing_is_lost(tmp_path, port):
    """Catches peers that do not end when one is killed, and a restart that differs from an undisturbed run."""
    script = tmp_path / "dies_once.py"
    script.write_text(DIES_ONCE.format(example=str(STEP)))
    run_script(STEP, 2, "--epochs", 5, "--snapshot", tmp_path / "whole.pt", folder=tmp_path)
    killed = torchrun(port, "--max-restarts", 1, script, "--epochs", 5, "--snapshot", tmp_path / "killed.pt")
    assert killed.returncode == 0, killed.stderr
    assert "resuming after epoch 3" in killed.stdout
    one, other = (torch.load(tmp_path / name, weights_only=True) for name in ("whole.pt", "killed.pt"))
    for name, weight in one["model"].items():
        assert torch.equal(weight, other["model"][name]), name


@pytest.mark.parametrize(
    ("world_size", "words", "sent"), [(2, ("--world-size", 2, "--rank", "{rank}"), "0.3"), (1, (), "0.0")], ids=["two", "alone"]
)
def test_the_example_needs_no_launcher(tmp_path, port, world_size, words, sent):
    """Catches a store that only torchrun's variables can find, and a script that only runs under a launcher."""
    said = run_script(EXAMPLE, world_size, "--epochs", 1, "--port", port, *words, folder=tmp_path, launched=False)
    assert "test accuracy" in said[0]
    assert f"each rank sent {sent} MB" in said[0]


def data_of(rank):
    return torch.randn(4, 3, generator=torch.Generator().manual_seed(rank))


def keep_local(state, bucket):
    future = torch.futures.Future()
    future.set_result(bucket.buffer())
    return future


def wrap_models(rank, world_size):
    torch.manual_seed(rank)  # DDP makes the weights equal
    model = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    with accel.wrap(model, optimizer, "bytegrad", codec="none", bucket_cap_mb=1) as ddp:
        assert isinstance(ddp, nn.parallel.DistributedDataParallel)
        assert ddp.module is model
        assert ddp.replica.communicator.timeout.total_seconds() == 60, "must be the default group's, not torch's half an hour"
        before = [parameter.detach().clone() for parameter in model.parameters()]
        with ddp.no_sync():
            ddp(data_of(rank)).sum().backward()
        ddp(data_of(rank + 10)).sum().backward()
        optimizer.step()
        assert ddp.replica.rounds == 1
        assert ddp.statistics.sent_bytes > 0
    assert not own_threads()
    mean = sum((data_of(r).sum(0) + data_of(r + 10).sum(0)) for r in range(world_size)) / world_size
    torch.testing.assert_close(model.weight, before[0] - 0.5 * mean.expand(2, 3))

    ddp = accel.wrap(model, [optimizer], device_ids=None)
    with pytest.raises(TypeError, match="not wrapped yet: got AccelDataParallel"):
        accel.wrap(ddp, optimizer)
    assert ddp.replica.communicator.name == "gradient_allreduce"
    assert accel.unwrap(ddp) is model
    assert not own_threads()

    # A copy has no algorithm, and trains as plain DDP.
    ddp = accel.wrap(model, optimizer, "bytegrad")
    copied = copy.deepcopy(ddp)
    copied(data_of(rank)).sum().backward()
    mean = sum(data_of(r).sum(0) for r in range(world_size)) / world_size
    torch.testing.assert_close(copied.module.weight.grad, mean.expand(2, 3))
    assert ddp.replica.rounds == 0
    with pytest.raises(TypeError, match=r"what lightning_accel\.wrap has returned is needed"):
        accel.unwrap(copied)

    # So does one that was pickled, whether the algorithm takes whole buckets or lets DDP divide.
    plain = accel.wrap(model, optimizer)
    for wrapped in (ddp, plain):
        pickled = pickle.loads(pickle.dumps(wrapped))
        assert pickled._comm_hooks == []
        for _ in range(2):
            pickled.zero_grad()
            pickled(data_of(rank)).sum().backward()
            torch.testing.assert_close(pickled.module.weight.grad, mean.expand(2, 3))
        assert wrapped.replica.rounds == 0
    assert accel.unwrap(torch.compile(plain)) is model

    # One that is dropped leaves no thread.
    for _ in range(2):
        ddp(data_of(rank)).sum().backward()
    assert own_threads()
    del ddp, copied, wrapped
    gc.collect()
    deadline = time.monotonic() + 10
    while own_threads() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not own_threads()

    ddp = accel.wrap(model, optimizer)
    ddp.register_comm_hook(None, keep_local)
    with pytest.raises(RuntimeError, match="take the place of the algorithm"):
        ddp(data_of(rank))
    accel.unwrap(ddp)
    for options, error, message in (
        ({"algorithm": "bytegrda"}, ValueError, "did you mean 'bytegrad'"),
        ({"algorithm": "bytegrad", "codek": "int8"}, TypeError, "did you mean 'codec'"),
        ({"algorithm": "bytegrad", "codec": "int9"}, ValueError, "codec must be one of"),
    ):
        with pytest.raises(error, match=message):
            accel.wrap(model, optimizer, **options)
    return True


def test_wrap_trains_and_unwrap_gives_the_model_back():
    """Catches accumulation that is not averaged, options that reach the wrong one of two, and threads that are left."""
    assert run_ranks(wrap_models, 2) == [True] * 2


def test_wrong_arguments_are_refused_before_anybody_waits(tmp_path):
    """Catches a wait for other ranks, half an hour by default, or an error from inside of torch, for a slip of the pen."""
    model = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    two = {"rank": 0, "world_size": 2}
    for options, error, message in (
        ({"backend": "glo"}, ValueError, "backend must be one of .*gloo.*: got 'glo'"),
        ({"backend": "cpu:gloo,cuda:ncl"}, ValueError, "got 'cpu:gloo,cuda:ncl'"),
        ({"timeout": 30}, TypeError, "timeout must be a datetime.timedelta.*: got 30"),
        ({"port": 99999}, ValueError, "port must be from 1 to 65535: got 99999"),
    ):
        with pytest.raises(error, match=message):
            accel.init_process_group(**two | options)
    for arguments, message in (
        ((model, "bytegrad"), "the optimizer, or all of them, after the model: got str"),
        ((model, model.parameters()), "got Parameter"),
        ((optimizer, model), "a model that is not wrapped yet: got SGD"),
    ):
        with pytest.raises(TypeError, match=message):
            accel.wrap(*arguments)
    for use in (
        accel.unwrap,
        partial(accel.save_checkpoint, tmp_path / "a.pt"),
        partial(accel.load_checkpoint, tmp_path / "a.pt"),
    ):
        with pytest.raises(TypeError, match=r"what lightning_accel.wrap has returned is needed: got Linear"):
            use(model)


def save_models(rank, world_size, folder):
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    optimizer = torch.optim.Adam(model.parameters())
    with accel.wrap(model, optimizer, "bytegrad") as ddp:
        ddp(data_of(rank)).sum().backward()
        optimizer.step()
        path = Path(folder, "new", "a.pt")
        accel.save_checkpoint(path, ddp, optimizer, note="mine")
        saved = path.read_bytes()  # complete on every rank
        with pytest.raises(RuntimeError, match=r"rank 0 could not write .*b.pt"):
            accel.save_checkpoint(Path(folder, "new", "a.pt", "b.pt"), ddp, optimizer)
        with pytest.raises(RuntimeError, match=r"rank 0 could not write .*a.pt"):
            accel.save_checkpoint(path, ddp, optimizer, note=lambda: None)
        with pytest.raises(RuntimeError, match=r"a.pt: TypeError: extra\['note'\]\[1\] must be .* PosixPath"):
            accel.save_checkpoint(path, ddp, optimizer, note=[1, path])  # could be written, but not read with weights_only=True
        assert path.read_bytes() == saved, "a failed save must leave the old file"
        assert list(path.parent.iterdir()) == [path]
        with torch.no_grad():
            model.weight.zero_()
        assert accel.load_checkpoint(path, ddp, optimizer) == {"note": "mine"}
        assert model.weight.abs().min() > 0
        assert ddp.replica.rounds == 1
        with pytest.raises(ValueError, match="holds 1 optimizers, 0 were given"):
            accel.load_checkpoint(path, ddp)
        torn = Path(folder, f"torn{rank}.pt")
        torn.write_bytes(saved[: len(saved) // 2])
        with pytest.raises(ValueError, match=r"torn\d.pt is torn"):
            accel.load_checkpoint(torn, ddp, optimizer)
        torch.save({"model": {}}, torn)
        with pytest.raises(ValueError, match="was not written by save_checkpoint"):
            accel.load_checkpoint(torn, ddp, optimizer)
        with pytest.raises(FileNotFoundError):
            accel.load_checkpoint(Path(folder, "none.pt"), ddp, optimizer)
    return True


def test_checkpoints_are_complete_or_not_there(tmp_path):
    """Catches a file that is written in place, a rank that waits for one that failed, and an error that names no file."""
    assert run_ranks(save_models, 2, str(tmp_path)) == [True] * 2


def use_closed(rank, world_size, folder):
    for algorithm in ("bytegrad", "decentralized", "low_precision_decentralized", "async"):
        model = nn.Linear(3, 2)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)

        def train(ddp, optimizer=optimizer):
            for step in range(3):
                optimizer.zero_grad()
                ddp(data_of(rank + step)).square().sum().backward()
                optimizer.step()

        with accel.wrap(model, optimizer, algorithm) as ddp:
            train(ddp)
        path = Path(folder, f"{algorithm}.pt")
        accel.save_checkpoint(path, ddp, optimizer)
        assert torch.equal(torch.load(path, weights_only=True)["model"]["weight"], model.weight)
        ddp.replica.pause()
        ddp.replica.resume()
        assert accel.unwrap(ddp) is accel.unwrap(ddp) is model
        assert not own_threads()
        queue = ddp.replica.communicator.queues[0]
        with pytest.raises(RuntimeError, match="late was started after communication was closed"):
            ddp.replica.communicator.submit("late", torch.zeros(1), Step("late", queue, lambda: None))
        with pytest.raises(RuntimeError, match="late was started after communication was closed"):
            ddp.replica.communicator.run_detached("late", lambda: None, queue)
        assert not own_threads()

        failed = []

        def fail(train=train, model=model, optimizer=optimizer, algorithm=algorithm, failed=failed):
            with accel.wrap(model, optimizer, algorithm) as ddp:
                try:
                    train(ddp)
                    torch.distributed.barrier()
                    raise ValueError("on all ranks")
                finally:
                    failed.append(ddp)

        with pytest.raises(ValueError, match="on all ranks"):
            fail()
        for end in (accel.unwrap, partial(accel.save_checkpoint, path)):
            if algorithm == "bytegrad":  # equal at each step
                end(failed[0])
            else:
                with pytest.raises(RuntimeError, match="weights may differ between ranks, and communication was closed"):
                    end(failed[0])
        assert not own_threads()
    return True


def test_after_its_end_a_model_is_saved_or_refused_and_nothing_starts_again(tmp_path):
    """Catches a closed replica that is used as if it were alive, and weights that differ taken for one model."""
    assert run_ranks(use_closed, 2, str(tmp_path)) == [True] * 2


def load_data(rank, world_size):
    loader = accel.get_dataloader(list(range(10)), batch_size=5, shuffle=True)
    orders = [torch.cat(list(loader)).tolist() for _ in range(3)]
    loader.sampler.set_epoch(1)
    assert torch.cat(list(loader)).tolist() == orders[1]
    with pytest.raises(ValueError, match="makes the sampler"):
        accel.get_dataloader([1], sampler=[0])
    logger = accel.get_logger("said")
    assert accel.get_logger("said") is logger
    (handler,) = logger.handlers
    handler.stream = io.StringIO()
    logger.info("hello")
    logging.getLogger("said.child").warning("careful")  # has no filter of its own
    assert handler.stream.getvalue() == "[rank 0] hello\n" * (rank == 0) + f"[rank {rank}] careful\n"
    return orders


def test_each_rank_has_its_part_in_a_new_order_each_epoch():
    """Catches a sampler whose epoch nobody sets: every epoch would have one order."""
    one, other = run_ranks(load_data, 2)
    for mine, theirs in zip(one, other, strict=True):
        assert sorted(mine + theirs) == list(range(10))
    assert one[0] != one[1] != one[2]


def join_twice(rank, world_size, port, joined):
    join = torch.distributed.init_process_group

    def join_late(*arguments, **options):
        join(*arguments, **options)
        time.sleep(0.5)
        Path(joined).touch()

    if rank == 1:
        torch.distributed.init_process_group = join_late
    accel.init_process_group(rank=rank, world_size=world_size, port=port)
    assert Path(joined).exists(), "rank 0 could leave while rank 1 still connects to it, which would fail then"
    assert (accel.get_rank(), accel.get_world_size()) == (rank, 2)
    assert (accel.get_local_rank(), accel.get_local_world_size(), accel.get_node_rank()) == (rank, 2, 0)
    with pytest.raises(RuntimeError, match="default process group already"):
        accel.init_process_group()
    accel.destroy_process_group()
    accel.destroy_process_group()


def test_joining_twice_is_refused_and_leaving_twice_is_not(port, tmp_path):
    """Catches a second default group that hangs, an end that raises, and a rank that has joined before the others have."""
    run_ranks(join_twice, 2, port, str(tmp_path / "joined"), backend=None)
