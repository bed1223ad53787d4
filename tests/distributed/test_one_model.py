"""One model, equal on all ranks, in plain PyTorch: what a consensus covers, what it sends, and what it refuses."""

import copy
import re
from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from helpers.ranks import run_ranks
from helpers.tensors import assert_same_bits
from helpers.training import TIMEOUT, node_of
from lightning_accel import AsyncAverage, Decentralized, LowPrecisionDecentralized, Replica, save_checkpoint, unwrap, wrap
from lightning_accel.reference.weights import mean

WEIGHT_ALGORITHMS = ["decentralized", "low_precision_decentralized", "async"]


class Student(torch.nn.Module):
    """A network with everything beside it that is updated by hand, each rank's own until a consensus, and a frozen backbone."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.BatchNorm1d(8), torch.nn.Linear(8, 3))
        self.backbone = torch.nn.Linear(500, 200).requires_grad_(False)
        self.teacher = copy.deepcopy(self.net).requires_grad_(False)
        self.average = AveragedModel(self.net, multi_avg_fn=get_ema_multi_avg_fn(0.5)).requires_grad_(False)
        self.register_buffer("centre", torch.zeros(3), persistent=False)
        self.register_buffer("queue", torch.zeros(2, 3, dtype=torch.bfloat16))
        self.register_buffer("spectrum", torch.zeros(2, 2, dtype=torch.complex64))
        self.register_buffer("steps", torch.tensor(0))
        self.register_buffer("seen", torch.zeros(5, dtype=torch.bool))
        self.register_buffer("window", self.queue[1])
        self.register_buffer("image", torch.zeros(2, 3, 4, 4).to(memory_format=torch.channels_last))
        self.register_buffer("equal", torch.full((7,), 0.1, dtype=torch.float64))
        self.register_buffer("nothing", torch.zeros(0))
        self.register_buffer("meta", torch.zeros(3, device="meta"))

    def forward(self, inputs):
        with torch.no_grad():
            self.centre.lerp_(self.teacher(inputs).mean(0), 0.1)
        return (self.net(inputs) - self.centre).pow(2).sum()

    def update(self, rank):
        """What a loop does by hand after a step; through `.data`, which no version counter sees."""
        for mine, own in zip(self.teacher.parameters(), self.net.parameters(), strict=True):
            mine.data.lerp_(own.data, 0.5)
        self.average.update_parameters(self.net)
        with torch.no_grad():
            self.queue[0] = self.centre
            self.queue[1, rank % 3] = rank + 1
            self.spectrum[0, 1] = complex(rank, -rank)
            self.steps += rank + 1
            self.seen[rank] = True
            self.small.copy_(torch.full((3,), float(rank)))
            self.image[0, :, rank] += rank + 1


def state_of(model):
    """All parameters and buffers, those that are not persistent too."""
    held = [*model.named_parameters(), *model.named_buffers()]
    held = [(name, tensor.view(torch.uint8) if tensor.dtype == torch.float8_e4m3fn else tensor) for name, tensor in held]
    return {name: tensor.detach().clone() for name, tensor in held if not tensor.is_meta}


def gathered(value):
    """What each rank has."""
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def in_bytes(tensor):
    return tensor.contiguous().view(-1).view(torch.uint8)


def expected_state(states, nodes):
    """What all ranks hold after a consensus; what is equal on all ranks stays."""
    result = {}
    for name, tensor in states[0].items():
        tensors = [state[name] for state in states]
        real = [torch.view_as_real(t) if t.is_complex() else t for t in tensors]
        if all(torch.equal(in_bytes(t), in_bytes(tensor)) for t in tensors):
            result[name] = tensor
        elif tensor.dtype in (torch.float32, torch.bfloat16, torch.complex64):
            means = mean([mean([real[rank] for rank in node]) for node in nodes])
            result[name] = torch.view_as_complex(means) if tensor.is_complex() else means
        else:
            result[name] = tensor
    return result


def assert_same_state(state, expected, what):
    assert state.keys() == expected.keys()
    for name, tensor in expected.items():
        pair = (torch.view_as_real(t) if t.is_complex() else t for t in (state[name], tensor))
        assert_same_bits(*pair, f"{what}, {name}")


def inputs_of(rank, round_):
    return torch.randn(6, 4, generator=torch.Generator().manual_seed(100 * rank + round_)) + 0.1 * rank


def attached(model, optimizer, algorithm, nodes):
    """As `wrap` does it, on the nodes that a rank is told to be on."""
    ddp = DistributedDataParallel(model)
    return ddp, Replica(ddp, algorithm, [optimizer], timeout=TIMEOUT, node_name=node_of(dist.get_rank(), nodes))


def teachers(rank, world_size, cases, path):
    for algorithm, nodes in cases:
        model = Student()
        optimizer = torch.optim.SGD(model.net.parameters(), lr=0.1)
        if nodes is None:
            ddp = wrap(model, optimizer, algorithm, timeout=TIMEOUT)
            replica = ddp.replica
        else:
            ddp, replica = attached(model, optimizer, algorithm, nodes)
        model.register_buffer("small", torch.zeros(3).to(torch.float8_e4m3fn))  # DDP over gloo could not broadcast it
        for round_ in range(3):
            ddp(inputs_of(rank, round_)).backward()
            optimizer.step()
            optimizer.zero_grad()
            model.update(rank)
        replica.pause()  # what async has averaged so far is applied before the states are compared
        if rank == 1:
            model.teacher[0].bias.data[1] = float("nan")
            model.image.data[1, 2, 3, 3] = -0.0
        states = gathered(state_of(model))
        own = {name for name, tensor in states[0].items() if not torch.equal(in_bytes(tensor), in_bytes(states[1][name]))}
        assert {"teacher.0.weight", "average.module.0.weight", "centre", "queue", "window", "spectrum", "steps", "seen"} <= own
        assert {"small", "image", "net.1.running_mean"} <= own, "what is to be made equal must differ before"
        assert not own & {"backbone.weight", "equal"}
        replica.consensus()
        what = f"{algorithm}, {nodes}"
        flat = [[r] for r in range(world_size)]
        assert_same_state(state_of(model), expected_state(states, nodes or flat), what)
        # A second consensus changes nothing; and what is equal is not sent: the weights alone, and a few bytes to compare.
        before = replica.statistics.sent_bytes
        replica.consensus()
        sent_bytes = replica.statistics.sent_bytes - before
        assert_same_state(state_of(model), expected_state(states, nodes or flat), f"{what}, again")
        trained = sum(parameter.numel() for parameter in model.net.parameters())
        compared = len(state_of(model)) - len(list(model.net.parameters()))
        assert sent_bytes <= (world_size - 1) * (2 * 4 * (trained / world_size + 2) + 28 + 4 + 8 * compared) + 200
        assert sent_bytes < in_bytes(model.backbone.weight.detach()).numel() / 40
        if nodes is None:
            model.update(rank)
            save_checkpoint(path, ddp, optimizer)
            saved = torch.load(path, weights_only=True)["model"]
            for name, tensor in state_of(model).items():
                if name in saved:
                    assert torch.equal(in_bytes(saved[name]), in_bytes(tensor)), f"{what}, saved, {name}"
            dist.barrier()  # the next file has the same path
            model.update(rank)
            assert unwrap(ddp) is model
            assert_same_state(state_of(model), gathered(state_of(model))[0], f"{what}, at the end")
        else:
            replica.close()


@pytest.mark.parametrize(
    ("world_size", "cases"),
    [
        (2, [(name, None) for name in WEIGHT_ALGORITHMS]),
        (3, [(name, None) for name in WEIGHT_ALGORITHMS]),
        # On the second kind of nodes, ranks of a node do not follow one another, and peers are not in the order of nodes.
        (4, [(Decentralized(hierarchical=True), ((0, 1), (2, 3))), (LowPrecisionDecentralized(), ((0, 3), (1, 2)))]),
    ],
)
def test_everything_beside_the_weights_is_equal_after_a_consensus(tmp_path, world_size, cases):
    """Catches teachers, averages in the module and buffers that stay each rank's own or are copied where they have a mean, NaNs
    that differ, and frozen weights that are sent although they are equal."""
    run_ranks(teachers, world_size, cases, str(tmp_path / "checkpoint"))


def raised(action):
    """The message of the ValueError that every rank raises, the same on all."""
    with pytest.raises(ValueError, match=r"rank|cannot be compared|anew") as error:
        action()
    messages = gathered(str(error.value))
    assert len(set(messages)) == 1, messages
    return messages[0]


class Small(torch.nn.Module):
    def __init__(self, **buffers):
        super().__init__()
        torch.manual_seed(3)
        self.net = torch.nn.Linear(4, 2)
        self.head = torch.nn.Linear(4, 2).requires_grad_(False)
        self.register_buffer("mask", torch.ones(4))
        for name, buffer in buffers.items():
            self.register_buffer(name, buffer)

    def forward(self, inputs):
        return (self.net(inputs * self.mask) - 1).pow(2).sum()


def unlike_models(rank):
    """A model that differs on one rank of three, and what the message says of it."""
    odd = rank == 1
    yield Small(cache=torch.zeros(8 if odd else 4)), r"buffer 'cache' is torch.float32 of shape \(4,\) on ranks 0, 2, "
    yield Small(cache=torch.zeros(4, dtype=torch.int64 if odd else torch.float32)), r"torch.int64 of shape \(4,\) on rank 1"
    yield Small(**({"cache": torch.zeros(4)} if odd else {})), "buffer 'cache' is missing on ranks 0, 2, torch.float32"
    yield (
        Small(**{name: torch.zeros(1) for name in ("ba" if odd else "ab")}),
        "the order differs, number 5 is buffer 'a' on ranks",
    )
    model = Small()
    model.net = torch.nn.Linear(4, 3 if odd else 2)
    yield model, r"parameter 'net.weight' \(one of 2\) is torch.float32 of shape \(2, 4\), trainable on ranks 0, 2"
    model = Small()
    model.head.bias.requires_grad_(odd)
    yield model, r"parameter 'head.bias' is torch.float32 of shape \(2,\), frozen on ranks 0, 2, .*trainable on rank 1"
    model = Small()
    model.head = torch.nn.Linear(4, 1 if odd else 2).requires_grad_(False)
    yield model, r"parameter 'head.weight' \(one of 2\) .*frozen on rank 1"


def refused_at_the_start(rank, world_size):
    for name in ("gradient_allreduce", "bytegrad", *WEIGHT_ALGORITHMS):
        for model, message in unlike_models(rank):
            said = raised(partial(wrap, model, torch.optim.SGD(model.net.parameters(), lr=0.1), name))
            assert said.startswith(f"{name} needs the same parameters and buffers on all ranks: ")
            assert re.search(message, said), said
        # With init_sync=False DDP sends nothing at first, and ranks train what they have.
        model = Small()
        model.net.bias.data += rank
        assert "parameter 'net.bias' (one of 1)" in raised(
            partial(wrap, model, torch.optim.SGD(model.net.parameters(), lr=0.1), name, init_sync=False)
        )
    # Buffers that DDP does not broadcast may differ, but for algorithms that average them.
    for name in ("gradient_allreduce", *WEIGHT_ALGORITHMS):
        model = Small(cache=torch.zeros(4 + rank))
        optimizer = torch.optim.SGD(model.net.parameters(), lr=0.1)
        start = partial(wrap, model, optimizer, name, broadcast_buffers=False, timeout=TIMEOUT)
        if name in WEIGHT_ALGORITHMS:
            assert r"shape (4,) on rank 0, torch.float32 of shape (5,) on rank 1, " in raised(start)
        else:
            ddp = start()
            ddp(inputs_of(rank, 0)).backward()
            optimizer.step()
            unwrap(ddp)
    # What DDP is told to ignore is nobody's business.
    for name in WEIGHT_ALGORITHMS:
        model = Small(cache=torch.full((4 + rank,), float(rank)))
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, ["cache", "head.bias"])
        model.head.bias.data.fill_(rank)
        optimizer = torch.optim.SGD(model.net.parameters(), lr=0.1)
        ddp = wrap(model, optimizer, name, timeout=TIMEOUT)
        ddp(inputs_of(rank, 0)).backward()
        optimizer.step()
        unwrap(ddp)
        assert model.cache.tolist() == [rank] * (4 + rank)
        assert model.head.bias.tolist() == [rank] * 2


def test_a_model_that_differs_between_ranks_is_refused_when_it_is_wrapped():
    """Catches broadcasts of unequal sizes, which end the process without a Python error, and a message on some ranks only."""
    run_ranks(refused_at_the_start, 3)


def grown_cache(model, rank):
    model.mask.resize_(6 if rank == 2 else 4)


def lazily_made(model, rank):
    if rank == 0:
        model.register_buffer("cache", torch.zeros(3), persistent=False)


def other_dtype(model, rank):
    model.mask = model.mask.to(torch.float64 if rank == 1 else torch.float32)


def sparse(model, rank):
    model.register_buffer("graph", torch.eye(3 + rank).to_sparse() if rank == 1 else torch.eye(3))


def sparse_everywhere(model, rank):
    model.register_buffer("graph", torch.eye(3).to_sparse())


def replaced(model, rank):
    model.net.bias = torch.nn.Parameter(model.net.bias.detach().clone())


CHANGES = [
    (grown_cache, "buffer 'mask' is torch.float32 of shape (4,) on ranks 0, 1, torch.float32 of shape (6,) on rank 2"),
    (lazily_made, "buffer 'cache' is torch.float32 of shape (3,) on rank 0, missing on ranks 1, 2"),
    (other_dtype, "torch.float64 of shape (4,) on rank 1"),
    (sparse, "torch.float32 (sparse_coo) of shape (4, 4) on rank 1"),
    (sparse_everywhere, "buffer 'graph' is torch.float32 (sparse_coo) of shape (3, 3), which cannot be compared"),
    (replaced, "parameter 'net.bias' was torch.float32 of shape (2,), exchanged when the model was wrapped"),
]


def refused_later(rank, world_size, nodes, algorithms):
    for algorithm in algorithms:
        for change, message in CHANGES:
            model = Small()
            optimizer = torch.optim.SGD(model.net.parameters(), lr=0.1)
            ddp, replica = attached(model, optimizer, algorithm, nodes)
            ddp(inputs_of(rank, 0)).backward()
            optimizer.step()
            replica.pause()
            weights, bias, mask = model.net.weight.detach().clone(), model.net.bias, model.mask.clone()
            change(model, rank)
            assert message in raised(replica.consensus)
            assert_same_bits(model.net.weight.detach(), weights, "weights after the refusal")
            # Nobody has failed: once the model is the same again, all goes on.
            model.mask, model.net.bias = mask, bias
            for name in ("cache", "graph"):
                model._buffers.pop(name, None)
            replica.resume()
            ddp(inputs_of(rank, 1)).backward()
            optimizer.step()
            replica.consensus()
            assert_same_state(state_of(model), gathered(state_of(model))[0], "after it")
            replica.close()


@pytest.mark.parametrize(
    ("nodes", "algorithms"),
    [
        (None, [Decentralized(), LowPrecisionDecentralized(), AsyncAverage()]),
        (((0, 2), (1,)), [Decentralized()]),
        (((0,), (1,), (2,)), [LowPrecisionDecentralized(hierarchical=True)]),
    ],
)
def test_a_model_that_differs_later_is_refused_by_the_consensus(nodes, algorithms):
    """Catches messages of unequal sizes, which end the process, an error on one rank that others wait for, and a refusal after
    which communication is over."""
    run_ranks(refused_later, 3, nodes, algorithms)


def late_buffers(rank, world_size):
    """Buffers that a model gets after it was wrapped, one of them in inference mode, where a tensor cannot be changed outside."""
    for name in WEIGHT_ALGORITHMS:
        model = Small()
        optimizer = torch.optim.SGD(model.net.parameters(), lr=0.1)
        ddp = wrap(model, optimizer, name, timeout=TIMEOUT)
        ddp(inputs_of(rank, 0)).backward()
        optimizer.step()
        model.register_buffer("late", torch.full((2,), float(rank)))
        with torch.inference_mode():
            ddp.replica.consensus()
            model.register_buffer("cache", torch.full((3,), float(rank)))
        model.late += rank
        ddp.replica.consensus()
        assert model.cache.tolist() == [(world_size - 1) / 2] * 3
        assert model.late.tolist() == [world_size - 1] * 2
        # An average that a callback keeps, in another precision; named by the user in a plain loop.
        average = copy.deepcopy(model).double()
        average.net.weight.data += rank
        ddp.replica.algorithm.averages = [average]
        ddp.replica.consensus()
        assert_same_state(state_of(average), gathered(state_of(average))[0], "average")
        unwrap(ddp)


def test_buffers_made_later_are_equal_too():
    """Catches a list of buffers that is made once, and a consensus in Lightning's validation that cannot write them."""
    run_ranks(late_buffers, 2)
