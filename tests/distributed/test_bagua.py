"""Bagua's names: a script for Bagua runs, `with_bagua` leaves the module what it was, and communication keeps Bagua's order."""

import copy
import inspect
import pickle
import re
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

import lightning_accel as accel
import lightning_accel.bagua
import lightning_accel.bagua.torch_api as bagua
from helpers.ranks import own_threads, run_ranks, run_script
from lightning_accel.bagua.torch_api.algorithms import async_model_average, bytegrad, decentralized, gradient_allreduce, q_adam
from lightning_accel.bagua.torch_api.contrib import LoadBalancingDistributedBatchSampler, LoadBalancingDistributedSampler
from lightning_accel.bagua.torch_api.data_parallel import DistributedDataParallel

SCRIPT = Path(__file__).parents[1] / "helpers" / "bagua_script.py"

# Bagua's constructors, and what its code calls each algorithm; `hierarchical` is the default there.
ALGORITHMS = {
    "gradient_allreduce": (gradient_allreduce.GradientAllReduceAlgorithm, "hierarchical=False, average=True"),
    "bytegrad": (bytegrad.ByteGradAlgorithm, "hierarchical=True, average=True"),
    "decentralized": (
        decentralized.DecentralizedAlgorithm,
        "hierarchical=True, peer_selection_mode='all', communication_interval=1",
    ),
    "low_precision_decentralized": (
        decentralized.LowPrecisionDecentralizedAlgorithm,
        "hierarchical=True, communication_interval=1",
    ),
    "qadam": (q_adam.QAdamAlgorithm, "q_adam_optimizer, hierarchical=True"),
    "async": (
        async_model_average.AsyncModelAverageAlgorithm,
        "peer_selection_mode='all', sync_interval_ms=500, warmup_steps=0",
    ),
}


def test_a_script_for_bagua_runs_with_nothing_changed_but_its_imports(tmp_path):
    """Catches a name, an argument or a default that a script relies on, and ranks that train apart."""
    script, changed = re.subn(r"^(from|import) bagua", r"\1 lightning_accel.bagua", SCRIPT.read_text(), flags=re.MULTILINE)
    assert changed == 2
    (tmp_path / "script.py").write_text(script)
    said, others = run_script(tmp_path / "script.py", 2, folder=tmp_path)
    assert others == ""
    (accuracy,) = re.findall(r"^accuracy (0\.\d+)$", said, flags=re.MULTILINE)
    assert float(accuracy) > 0.85
    assert set(torch.load(tmp_path / "digits.pt", weights_only=True)) == {"0.weight", "0.bias", "2.weight", "2.bias"}


@pytest.mark.parametrize("name", ALGORITHMS)
def test_constructors_are_baguas(name):
    """Catches an argument in another place, another default, and options that our algorithm does not have."""
    cls, arguments = ALGORITHMS[name]
    parameters = inspect.signature(cls).parameters.values()
    assert ", ".join(str(parameter.replace(annotation=inspect.Parameter.empty)) for parameter in parameters) == arguments
    options = {} if name != "qadam" else {"q_adam_optimizer": torch.optim.SGD([nn.Parameter(torch.ones(1))])}
    made = bagua.algorithms.Algorithm.init(name, **options)
    assert type(made) is cls
    assert made.accel_algorithm.name == name
    if name != "async":
        assert made.accel_algorithm.hierarchical == (False if name == "gradient_allreduce" else "auto")
        assert cls(**options, hierarchical=False).accel_algorithm.hierarchical is False


def test_wrong_algorithms_are_refused():
    """Catches an error from deep inside, or none."""
    with pytest.raises(ValueError, match=r"must be one of .*gradient_allreduce.*: got 'bytegrda'"):
        bagua.algorithms.Algorithm.init("bytegrda")
    with pytest.raises(ValueError, match="must be 'all'"):
        async_model_average.AsyncModelAverageAlgorithm(peer_selection_mode="ring")
    with pytest.raises(TypeError, match="register_algorithm"):
        nn.Linear(1, 1).with_bagua([], object())
    with pytest.raises(ImportError, match=r"fuse_step\(\) is step\(\)"):
        bagua.contrib.fuse_optimizer  # noqa: B018
    assert lightning_accel.bagua.allreduce is bagua.allreduce


class Model(nn.Module):
    """With everything that a wrapper could get wrong: buffers, a parameter of its own, keywords, a branch."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3))
        self.norm = nn.BatchNorm1d(3)
        self.layer = nn.Linear(3, 2)
        self.other = nn.Linear(3, 2)

    def forward(self, x, *, use_other=True):
        x = self.norm(x * self.scale)
        return self.layer(x) + self.other(x) if use_other else self.layer(x)


def data_of(rank, step=0):
    return torch.randn(8, 3, generator=torch.Generator().manual_seed(10 * step + rank))


def mean_gradients(model, ranks, first=0, **arguments):
    """The mean of what these ranks alone would have, summed in rank order; None where no rank has one."""
    of_ranks = []
    for rank in range(first, first + ranks):
        alone = copy.deepcopy(model)
        alone.zero_grad()
        alone(data_of(rank), **arguments).square().sum().backward()
        of_ranks.append([parameter.grad for parameter in alone.parameters()])
    return [None if column[0] is None else sum(column) / ranks for column in zip(*of_ranks, strict=True)]


def assert_gradients(model, expected):
    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        assert (parameter.grad is None) == (gradient is None)
        if gradient is not None:
            assert torch.equal(parameter.grad, gradient)


def train_in_place(rank, world_size):
    torch.manual_seed(rank)  # with_bagua makes the weights equal
    model = Model()
    names, children = list(model.state_dict()), list(model.modules())
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    if rank == 0:  # as after a checkpoint that only rank 0 has read
        model(data_of(9)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert model.with_bagua([optimizer], gradient_allreduce.GradientAllReduceAlgorithm()) is model
    assert type(model) is Model
    assert list(model.state_dict()) == names
    assert list(model.modules()) == children
    assert int(optimizer.state[model.scale]["step"]) == 1
    assert model.bagua_optimizers == [optimizer]

    plain = copy.deepcopy(model)
    assert "forward" not in plain.__dict__
    expected = mean_gradients(plain, world_size)
    calls = []
    for hooked, name in ((model, "model"), (model.layer, "layer")):
        hooked.register_forward_hook(lambda *_, name=name: calls.append(name))
    model.scale.register_hook(lambda gradient: calls.append("gradient"))
    model(data_of(rank)).square().sum().backward()
    assert calls == ["layer", "model", "gradient"]
    assert_gradients(model, expected)
    assert plain.scale.grad is None
    optimizer.step()
    assert model.bagua_ddp.replica.rounds == 1
    accel.unwrap(model.bagua_ddp)
    assert not own_threads()
    return True


def test_a_module_trains_in_place():
    """Catches names with a prefix, hooks that run twice, a copy that trains the original, gradients that are not the mean."""
    assert run_ranks(train_in_place, 2) == [True] * 2


def change_algorithm(rank, world_size):
    torch.manual_seed(rank)
    model = Model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    # Bagua's, one with options of ours, a name.
    for algorithm in (bytegrad.ByteGradAlgorithm(), accel.ByteGrad(codec="none"), "bytegrad"):
        model.with_bagua([optimizer], algorithm, do_flatten=False)
        optimizer.zero_grad()
        model(data_of(rank)).square().sum().backward()
        assert model.bagua_algorithm is algorithm
        assert model.bagua_ddp.statistics.sent_bytes > 0
        gathered = [torch.empty_like(model.scale) for _ in range(world_size)]
        dist.all_gather(gathered, model.scale.grad)
        assert torch.equal(*gathered)
    # One rank evaluates alone: BatchNorm's buffers must not be broadcast then.
    model.eval()
    if rank == 0:
        with torch.no_grad():
            assert torch.equal(model(data_of(5)), pickle.loads(pickle.dumps(model))(data_of(5)))
    accel.unwrap(model.bagua_ddp)
    assert not own_threads()
    return True


def test_the_algorithm_may_change_and_one_rank_may_evaluate():
    """Catches two DDP instances on one module, and an evaluation that waits for the other ranks."""
    assert run_ranks(change_algorithm, 2) == [True] * 2


def train_parts(rank, world_size):
    # A forward that the script has put in the place of the class's, and parameters that get no gradient.
    torch.manual_seed(0)
    model = Model()
    model.forward = replaced = lambda x: Model.forward(model, x, use_other=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    algorithm = gradient_allreduce.GradientAllReduceAlgorithm()
    model.with_bagua([optimizer], algorithm, find_unused_parameters=True)
    assert copy.deepcopy(model).__dict__["forward"] is replaced
    for _ in range(2):
        optimizer.zero_grad()
        plain = Model()
        plain.load_state_dict(model.state_dict())
        expected = mean_gradients(plain, world_size, use_other=False)
        model(data_of(rank)).square().sum().backward()
        assert_gradients(model, expected)
        optimizer.step()
    accel.unwrap(model.bagua_ddp)

    # A parameter that is left out, and a group for each rank alone.
    groups = [bagua.new_group([member]) for member in range(world_size)]
    for is_alone in (False, True):
        torch.manual_seed(0)
        model = Model()
        local = mean_gradients(model, 1, first=rank)
        expected = local if is_alone else mean_gradients(model, world_size)
        if not is_alone:
            model._bagua_params_and_buffers_to_ignore = ["other.weight"]
            place = [name for name, _ in model.named_parameters()].index("other.weight")
            expected[place] = local[place]
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        model.with_bagua([optimizer], algorithm, bagua.from_torch_group(groups[rank]) if is_alone else None)
        model(data_of(rank)).square().sum().backward()
        assert_gradients(model, expected)
        accel.unwrap(model.bagua_ddp)
    return True


def test_parts_of_a_module_train():
    """Catches DDP's error about parameters without gradient, options that get lost, and groups that are not used."""
    assert run_ranks(train_parts, 2) == [True] * 2


def train_as_wrapped(rank, world_size, name):
    weights = []
    for is_bagua in (True, False):
        torch.manual_seed(0)
        model = Model()
        kind = q_adam.QAdamOptimizer if name == "qadam" else torch.optim.SGD
        optimizer = kind(model.parameters(), lr=0.1, **({"warmup_steps": 2} if name == "qadam" else {}))
        if is_bagua:
            options = {"q_adam_optimizer": optimizer} if name == "qadam" else {}
            called = model.with_bagua([optimizer], bagua.algorithms.Algorithm.init(name, **options))
        else:
            called = accel.wrap(model, optimizer, name)
        for step in range(4):
            if is_bagua and name == "async":
                model.bagua_algorithm.abort(model)
                model.bagua_algorithm.resume(model)
            optimizer.zero_grad()
            called(data_of(rank, step)).square().sum().backward()
            optimizer.step()
        weights.append(torch.cat([parameter.detach().flatten() for parameter in model.parameters()]))
        accel.unwrap(model.bagua_ddp if is_bagua else called)
    assert weights[0].isfinite().all()
    if name != "async":  # which averages by the clock
        assert torch.equal(*weights)
    assert not own_threads()
    return True


@pytest.mark.parametrize("name", ALGORITHMS)
def test_every_algorithm_trains_as_under_its_own_name(name):
    """Catches an algorithm that with_bagua attaches without its optimizer, its moments or its defaults."""
    assert run_ranks(train_as_wrapped, 2, name) == [True] * 2


def wrap_as_bagua(rank, world_size):
    torch.manual_seed(rank)
    model = Model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    algorithm = gradient_allreduce.GradientAllReduceAlgorithm()
    ddp = DistributedDataParallel(model, optimizers=[optimizer], algorithm=algorithm, broadcast_buffers=False)
    assert isinstance(ddp, nn.parallel.DistributedDataParallel)
    assert not ddp.broadcast_buffers
    with pytest.raises(TypeError, match="a module from with_bagua"):
        async_model_average.replica_of(model)
    assert async_model_average.replica_of(ddp) is ddp.replica
    expected = mean_gradients(model, world_size)
    ddp(data_of(rank)).square().sum().backward()
    assert_gradients(model, expected)
    accel.unwrap(ddp)
    return True


def test_baguas_distributed_data_parallel():
    """Catches an argument in another's place."""
    assert run_ranks(wrap_as_bagua, 2) == [True] * 2


def communicate(rank, world_size):
    def mine(numel=2, of=rank):
        return torch.arange(numel, dtype=torch.float32) + 10 * of

    ranks = range(world_size)
    last = world_size - 1
    total = sum(mine(of=r) for r in ranks)
    wide = sum(mine(6, of=r) for r in ranks)

    if rank == 0:
        bagua.send(mine(), last)
    received = torch.zeros(2)
    if rank == last:
        bagua.recv(received, 0)
        assert torch.equal(received, mine(of=0))

    for tensors in ([mine()], [mine(3), mine(1)]):
        bagua.broadcast_coalesced(tensors, 1)
        assert all(torch.equal(tensor, mine(tensor.numel(), of=1)) for tensor in tensors)
    tensor = mine()
    bagua.broadcast(tensor)
    assert torch.equal(tensor, mine(of=0))
    assert bagua.broadcast_object({"rank": rank}, 1) == {"rank": 1}

    sent, received = mine(), torch.full((2,), -1.0)
    bagua.reduce(sent, received, 1)
    assert torch.equal(sent, mine())
    assert torch.equal(received, total if rank == 1 else torch.full((2,), -1.0))
    bagua.reduce_inplace(sent, 1, bagua.ReduceOp.MAX)
    assert torch.equal(sent, mine(of=last) if rank == 1 else mine())

    sent = mine()
    bagua.allreduce(sent, received)
    assert torch.equal(sent, mine())
    assert torch.equal(received, total)
    bagua.allreduce(sent, received, bagua.ReduceOp.AVG)
    assert torch.equal(received, total / world_size)
    bagua.allreduce_inplace(sent, bagua.ReduceOp.MIN)
    assert torch.equal(sent, mine(of=0))
    several = [mine(), mine(3)]
    bagua.allreduce_coalesced_inplace(several)
    assert torch.equal(several[0], total)

    gathered = torch.empty(world_size, 2)  # one part a rank, in any shape
    bagua.allgather(mine(), gathered)
    assert torch.equal(gathered, torch.stack([mine(of=r) for r in ranks]))
    in_place = torch.zeros(world_size, 2)
    in_place[rank] = mine()
    bagua.allgather_inplace(in_place)
    assert torch.equal(in_place, gathered)

    received = torch.full((world_size, 2), -1.0)
    bagua.gather(mine(), received, 1)
    assert torch.equal(received, gathered if rank == 1 else torch.full((world_size, 2), -1.0))
    in_place = torch.zeros(world_size, 2) if rank == 1 else mine()
    if rank == 1:
        in_place[rank] = mine()
    bagua.gather_inplace(in_place, 2, 1)
    assert torch.equal(in_place, gathered if rank == 1 else mine())

    received = torch.empty(2)
    bagua.scatter(gathered if rank == 1 else torch.empty(0), received, 1)
    assert torch.equal(received, mine())
    in_place = gathered.clone() if rank == 1 else torch.empty(2)
    bagua.scatter_inplace(in_place, 2, 1)
    assert torch.equal(in_place, gathered if rank == 1 else mine())

    bagua.reduce_scatter(mine(6), received)
    assert torch.equal(received, wide[2 * rank : 2 * rank + 2])
    in_place = mine(6)
    bagua.reduce_scatter_inplace(in_place, bagua.ReduceOp.SUM)
    assert torch.equal(in_place, torch.cat([wide[2 * rank : 2 * rank + 2], mine(6)[2:]]))

    exchanged = torch.cat([mine(6, of=r)[2 * rank : 2 * rank + 2] for r in ranks])
    received = torch.empty(6)
    bagua.alltoall(mine(6), received)
    assert torch.equal(received, exchanged)
    in_place = mine(6)
    bagua.alltoall_inplace(in_place)
    assert torch.equal(in_place, exchanged)

    # Rank r sends s + 1 elements to rank s, from place 2 s on, and puts what comes from s at place 4 s.
    received = torch.zeros(12)
    counts = [s + 1 for s in ranks]
    bagua.alltoall_v(mine(7), counts, [2 * s for s in ranks], received, [rank + 1] * world_size, [4 * s for s in ranks])
    for r in ranks:
        assert torch.equal(received[4 * r : 4 * r + rank + 1], mine(7, of=r)[2 * rank : 3 * rank + 1])
    in_place = mine(6)
    bagua.alltoall_v_inplace(in_place, [2] * world_size, [2 * s for s in ranks])
    assert torch.equal(in_place, exchanged)

    # Ranks in a group are counted from 0.
    pair = bagua.new_group([2, 1])
    if rank:
        tensor = mine()
        bagua.broadcast(tensor, 0, pair)
        assert torch.equal(tensor, mine(of=1))
        bagua.allgather_inplace(in_place, pair)
    bagua.barrier()
    with pytest.raises(ValueError, match="for each of 3 ranks: got 7"):
        bagua.allgather_inplace(mine(7))
    with pytest.raises(ValueError, match="must have count 3 elements: got 2"):
        bagua.gather_inplace(mine(6) if rank == 0 else mine(2), 3, 0)
    assert (bagua.get_rank(), bagua.get_world_size(), bagua.is_initialized()) == (rank, world_size, True)
    return True


def test_communication():
    """Catches arguments in torch's order, a part at the wrong place, ranks of the world where those of a group are meant."""
    assert run_ranks(communicate, 3) == [True] * 3


def test_a_store_needs_no_launcher(monkeypatch, caplog):
    """Catches a local rank that is the rank, and Bagua's variables that have no effect in silence."""
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    monkeypatch.setenv("BAGUA_AUTOTUNE", "1")
    with pytest.raises(ValueError, match="a store needs rank, world_size and local_world_size: got 1, 2 and -1"):
        bagua.init_process_group(dist.HashStore(), 1, 2)
    assert caplog.text == ""  # rank 0 says what all would say alike
    with pytest.raises(ValueError, match="a store needs rank, world_size and local_world_size: got 0, 1 and -1"):
        bagua.init_process_group(dist.HashStore(), 0, 1)
    bagua.init_process_group(dist.HashStore(), 0, 1, 1)
    assert "lightning-accel: BAGUA_AUTOTUNE: set, but there is no tuning service" in caplog.text
    bagua.init_process_group()  # as a script does that has made the group itself
    assert (bagua.get_rank(), bagua.get_local_rank(), bagua.get_local_size()) == (0, 0, 1)
    accel.destroy_process_group()


def test_samplers_balance_as_baguas():
    """Catches another order than Bagua's own sampler gave for this seed, and ranks with different numbers of batches."""
    complexities = [5, 1, 4, 1, 5, 9, 2, 6, 5, 3]

    def sampler(rank, **options):
        return LoadBalancingDistributedSampler(complexities, int, num_replicas=3, rank=rank, seed=7, **options)

    orders = []
    for rank in range(3):
        made = sampler(rank, random_level=0.5)
        made.set_epoch(2)
        orders.append(list(made))
        assert len(made) == 4
    assert orders == [[2, 3, 5, 9], [8, 1, 3, 0], [7, 6, 1, 4]]
    assert list(sampler(0, shuffle=False)) == [1, 9, 4, 5]
    assert list(sampler(2, shuffle=False, drop_last=True)) == [6, 0, 7]

    def batches(indices):  # of a complexity of at most 8
        made = [[]]
        for index in indices:
            if made[-1] and sum(complexities[k] for k in made[-1]) + complexities[index] > 8:
                made.append([])
            made[-1].append(index)
        return made

    for drop_last, count in ((False, 3), (True, 2)):
        made = [LoadBalancingDistributedBatchSampler(sampler(rank), batches, drop_last) for rank in range(3)]
        assert {len(list(one)) for one in made} == {len(one) for one in made} == {count}
    first = list(made[0])
    made[0].set_epoch(1)
    assert list(made[0]) != first
    for wrong, match in (({"rank": 3}, "below num_replicas 3: got 3"), ({"rank": 0, "random_level": 2}, "from 0 to 1: got 2")):
        with pytest.raises(ValueError, match=match):
            sampler(**wrong)
    with pytest.raises(ValueError, match="drop_last=False"):
        LoadBalancingDistributedBatchSampler(sampler(0, drop_last=True), batches)
    with pytest.raises(ValueError, match=r"give every rank a batch: ranks got \[0, 0, 0\]"):
        LoadBalancingDistributedBatchSampler(sampler(0), lambda indices: [])
