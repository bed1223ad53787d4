"""ByteGrad through a real DDP, on gloo: every rank against the specification, to the bit."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from helpers.models import GivenGradients, all_kinds, assert_gradients, few_kinds
from helpers.ranks import run_ranks
from helpers.sequences import failures_of
from helpers.tensors import CODECS, assert_same_bits, normal
from helpers.training import Training
from lightning_accel import ByteGrad
from lightning_accel.reference.bytegrad import bytegrad


def check(rank, world_size, codecs, average, options, device="cpu"):
    of_ranks = [[all_kinds(r, step) for r in range(world_size)] for step in range(2)]
    for codec in codecs:
        expected = [bytegrad(of_step, codec, average=average) for of_step in of_ranks]
        for ddp_options in options:
            algorithm = ByteGrad(codec, error_feedback=False, average=average)
            with Training(GivenGradients(of_ranks[0][rank]), algorithm, device=device, **ddp_options) as training:
                # DDP rebuilds its buckets after the first backward: the same gradients come before and after that.
                for count, step in enumerate((0, 1, 0)):
                    training.backward(of_ranks[step][rank])
                    assert_gradients(training.model, expected[step], f"{codec}, {ddp_options}, backward {count}")


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_every_rank_holds_the_specified_mean(world_size):
    """Catches results that depend on how DDP fills its buckets, lost tails, wrong owners, wrong order of sums."""
    options = [{"bucket_cap_mb": 1}, {"bucket_cap_mb": 25}, {"bucket_cap_mb": 0.02, "gradient_as_bucket_view": True}]
    run_ranks(check, world_size, CODECS, True, options)


@pytest.mark.parametrize("world_size", [2, 3])
def test_sum_instead_of_mean(world_size):
    """Catches an `average` that is accepted and ignored, or undone by multiplying after the second quantisation."""
    run_ranks(check, world_size, ("int8", "none"), False, [{"bucket_cap_mb": 1}])


def static_graph(rank, world_size):
    """Catches a hook that DDP calls otherwise in a static graph."""
    steps = [[few_kinds(r, step) for r in range(world_size)] for step in range(4)]
    with Training(GivenGradients(steps[0][rank]), ByteGrad(), static_graph=True, bucket_cap_mb=0.02) as training:
        for step, of_ranks in enumerate(steps):
            training.backward(of_ranks[rank])
            assert_gradients(training.model, bytegrad(of_ranks), f"step {step}")


def unused(rank, world_size):
    """Catches plans keyed by a bucket's index. Parameter 1 is unused on rank 0 alone, parameter 2 on all, and steps differ."""
    steps = [[few_kinds(r, step) for r in range(world_size)] for step in range(4)]
    options = {"find_unused_parameters": True, "bucket_cap_mb": 0.02}
    with Training(GivenGradients(steps[0][rank]), ByteGrad(), **options) as training:
        for step in range(4):
            of_ranks = [list(gradients) for gradients in steps[step]]
            used = [list(gradients) for gradients in steps[step]]
            if step % 2:
                of_ranks[0][1] = torch.zeros_like(of_ranks[0][1])
                used[0][1] = None
            for gradients in used:
                gradients[2] = None
            training.backward(used[rank])
            wanted = bytegrad(of_ranks)
            wanted[2] = None
            assert_gradients(training.model, wanted, f"step {step}")


def frozen(rank, world_size):
    """Catches blocks of others' messages that shift where a frozen parameter owns some too."""
    steps = [[few_kinds(r, step) for r in range(world_size)] for step in range(3)]
    with Training(GivenGradients(steps[0][rank], frozen=[0]), ByteGrad(), bucket_cap_mb=0.02) as training:
        for step, of_ranks in enumerate(steps):
            training.backward(of_ranks[rank])
            assert_gradients(training.model, [None, *bytegrad(of_ranks)[1:]], f"step {step}")


def tied(rank, world_size):
    """Catches a tied parameter that counts twice: it is one, with the sum of both uses as its gradient."""
    shapes = [normal(n, torch.float32, seed=1) for n in (3000, 100, 3000)]
    gradients = [[normal(t.numel(), torch.float32, seed=10 * r + k) for k, t in enumerate(shapes)] for r in range(world_size)]
    wanted = bytegrad([[own[0] + own[2], own[1]] for own in gradients])
    with Training(GivenGradients(shapes, tied=[(0, 2)]), ByteGrad(), bucket_cap_mb=0.002) as training:
        for step in range(3):
            training.backward(gradients[rank])
            assert_gradients(training.model, wanted, f"step {step}")


def empty(rank, world_size):
    """Catches a bucket that holds nothing but an empty parameter, and a message that holds nothing for some ranks."""
    small = [normal(5, torch.float32, seed=1), torch.zeros(0, dtype=torch.float16), torch.zeros(0, dtype=torch.float64)]
    for hierarchical, nodes in ((True, [range(world_size)]), (True, [[r] for r in range(world_size)]), (False, None)):
        with Training(GivenGradients(small), ByteGrad(hierarchical=hierarchical), nodes=nodes) as training:
            for step in range(3):
                training.backward(small)
                assert_gradients(training.model, bytegrad([small] * world_size, nodes=nodes), f"nodes {nodes}, step {step}")


def channels_last(rank, world_size):
    """Catches blocks that are not cut as the elements lie in memory, which DDP keeps in its buckets."""
    image = [normal(40 * 7 * 3 * 3, torch.float32, seed=r).view(40, 3, 3, 7).permute(0, 3, 1, 2) for r in range(world_size)]
    model = GivenGradients([image[0]])
    assert model.p0.is_contiguous(memory_format=torch.channels_last)
    wanted = bytegrad([[i.permute(0, 2, 3, 1).contiguous()] for i in image])[0].permute(0, 3, 1, 2)
    with Training(model, ByteGrad()) as training:
        for step in range(3):
            training.backward([image[rank]])
            assert_gradients(training.model, [wanted], f"step {step}")


GRAPHS = {check.__name__: check for check in (static_graph, unused, frozen, tied, empty, channels_last)}


def check_graphs(rank, world_size, names, begin):
    for name in names:
        begin(name)
        GRAPHS[name](rank, world_size)


@pytest.fixture(scope="module", params=[2, 3], ids="{} ranks".format)
def failures_of_graphs(request):
    return failures_of(check_graphs, GRAPHS, request.param, timeout=150)


@pytest.mark.parametrize("name", GRAPHS)
def test_graphs_of_all_kinds(failures_of_graphs, name):
    """What each check catches, its docstring says."""
    assert failures_of_graphs.get(name) is None, failures_of_graphs[name]


def check_nodes(rank, world_size, nodes, hierarchical, flat):
    of_ranks = [all_kinds(r) for r in range(world_size)]
    for codec in ("int8", "none", "fp16"):
        expected = bytegrad(of_ranks, codec, nodes=None if flat else nodes)
        algorithm = ByteGrad(codec, hierarchical=hierarchical)
        with Training(GivenGradients(of_ranks[rank]), algorithm, nodes=nodes, bucket_cap_mb=1) as training:
            for step in range(3):
                training.backward(of_ranks[rank])
                assert_gradients(training.model, expected, f"{codec}, step {step}")


@pytest.mark.parametrize(
    ("nodes", "hierarchical", "flat"),
    [
        (((0, 1), (2, 3)), "auto", False),
        (((0, 2), (1, 3)), True, False),
        (((0, 1), (2, 3)), False, True),
        (((0, 1),), True, False),
        (((0, 1),), "auto", True),
        (((0,), (1,)), True, False),
        (((0, 1), (2,)), "auto", True),
    ],
)
def test_nodes(nodes, hierarchical, flat):
    """Catches ranks that sum with the wrong peers, quantisation inside a single node, and a form that differs by rank."""
    run_ranks(check_nodes, sum(len(node) for node in nodes), nodes, hierarchical, flat)


def refuse(rank, world_size):
    model, nodes = torch.nn.Linear(3, 3), [[0, 1], [2]]
    with pytest.raises(ValueError, match="equally many ranks on every node: got 2, 1"):
        Training(model, ByteGrad(hierarchical=True), nodes=nodes)
    # Nothing was attached, and nobody waits: the remedy that the message names works.
    with Training(model, ByteGrad(), nodes=nodes) as training:
        training.ddp(torch.ones(1, 3)).sum().backward()
    return True


def test_uneven_nodes_are_refused_on_all_ranks():
    """Catches a refusal on one rank alone, with the others waiting in a collective."""
    assert run_ranks(refuse, 3) == [True] * 3


def poison(rank, world_size, codec, value):
    results = []
    clean = [normal(3000, torch.float32, seed=1), normal(100, torch.float32, seed=2)]
    with Training(GivenGradients(clean), ByteGrad(codec)) as training:
        for place in (0, 511, 512, 2999, None):
            gradients = [tensor.clone() for tensor in clean]
            if rank == world_size - 1 and place is not None:
                gradients[0][place] = value
            training.backward(gradients)
            first, second = (parameter.grad.isfinite() for parameter in training.model.parameters())
            results.append((place, first.tolist(), second.all().item()))
    return results


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_bad_value_on_one_rank_is_seen_by_all(codec, value):
    """Catches a NaN that a codec swallows: a gradient scaler on another rank would step on."""
    ranks = run_ranks(poison, 2, codec, value)
    for results in ranks:
        for place, finite, other_is_finite in results:
            bad = {k for k, is_finite in enumerate(finite) if not is_finite}
            if place is None:
                assert not bad, "poison that outlives its step"
            else:
                shared = {"int8": 512, "minmax_uint8": 512, "int4": 128, "sign": 512}.get(codec, 1)
                assert bad == set(range(place // shared * shared, min(place // shared * shared + shared, 3000)))
            assert other_is_finite, "poison that reaches another parameter"


def hold_memory(rank, world_size, nodes, find_unused_parameters):
    of_ranks = [[normal(5000, torch.float32, seed=r) for _ in range(40)] for r in range(world_size)]
    options = {"bucket_cap_mb": 0.1, "find_unused_parameters": find_unused_parameters}
    training = Training(GivenGradients(of_ranks[rank]), ByteGrad(), nodes=nodes, **options)
    held, allocations, empty = [], [], torch.empty

    def counting_empty(*args, **options):
        allocations.append(args)
        return empty(*args, **options)

    for step in range(6):
        if step == 3:
            torch.empty = counting_empty
        training.backward(of_ranks[rank])
        held.append(training.scratch_bytes)
    torch.empty = empty
    training.replica.close()
    return held, allocations


@pytest.mark.parametrize("find_unused_parameters", [False, True])
@pytest.mark.parametrize(("world_size", "nodes"), [(2, None), (4, ((0, 1), (2, 3)))])
def test_memory_stays_after_the_second_step(world_size, nodes, find_unused_parameters):
    """Catches an allocation in each step, and memory of DDP's first, all-embracing bucket that is kept."""
    for held, allocations in run_ranks(hold_memory, world_size, nodes, find_unused_parameters):
        assert held[0] > 0
        assert len(set(held[1:])) == 1, held
        assert allocations == []
        if not find_unused_parameters:
            assert held[1] < 1.5 * held[0]


def count_bytes(rank, world_size):
    numel = 512 * 400
    with Training(GivenGradients([torch.zeros(numel)]), ByteGrad()) as training:
        for _ in range(3):
            training.backward([torch.ones(numel)])
        return training.replica.statistics


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_bytes_are_counted(world_size):
    """Catches a counter that counts what stays on this rank, and one that misses a phase.

    2 (n-1) messages a step, each with 400/n blocks of 512 codes and a scale of 4 bytes; a ring of float32 sends 2 (n-1)/n * 4
    bytes an element. Rank 0 also tells the order of buckets once, here as three integers of 4 bytes.
    """
    for rank, statistics in enumerate(run_ranks(count_bytes, world_size)):
        n = world_size
        order = 12 if rank == 0 and n > 1 else 0
        assert statistics.sent_bytes == 3 * 2 * (n - 1) * (400 // n) * (512 + 4) + order
        assert statistics.full_precision_bytes == (3 * 2 * (n - 1) * 512 * 400 * 4 // n if n > 1 else 0)
        assert statistics.communication_seconds >= 0
        assert statistics.exposed_seconds >= 0


class Checkpointed(torch.nn.Module):
    def __init__(self, use_reentrant) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = torch.nn.ModuleList([torch.nn.Linear(60, 60) for _ in range(4)])
        self.use_reentrant = use_reentrant

    def forward(self, x):
        for layer in self.layers:
            x = layer(x) if self.use_reentrant is None else checkpoint(layer, x, use_reentrant=self.use_reentrant)
        return x.square().sum()


def recompute(rank, world_size):
    inputs = normal(8 * 60, torch.float32, seed=rank).view(8, 60).clamp(-1, 1).requires_grad_()
    results = []
    for use_reentrant in (None, True, False):
        with Training(Checkpointed(use_reentrant), ByteGrad(), bucket_cap_mb=0.01) as training:
            for _ in range(3):
                training.backward(inputs)
        results.append([parameter.grad for parameter in training.model.parameters()])
    for plain, reentrant, other in zip(*results, strict=True):
        assert_same_bits(reentrant, plain, "reentrant")
        assert_same_bits(other, plain, "not reentrant")


def test_activations_that_are_recomputed_change_nothing():
    """Catches a wait that is tied to the outermost backward: a reentrant checkpoint runs backwards inside of it."""
    run_ranks(recompute, 2)


def two_at_once(rank, world_size):
    steps = [[few_kinds(r, step) for r in range(world_size)] for step in range(4)]
    with (
        Training(GivenGradients(steps[0][rank]), ByteGrad(), bucket_cap_mb=0.02) as first,
        Training(GivenGradients(steps[0][rank]), ByteGrad("bf16"), bucket_cap_mb=0.05) as second,
    ):
        for step in range(3):
            first.ddp.zero_grad()
            second.ddp.zero_grad()
            losses = [first.ddp(steps[step][rank]), second.ddp(steps[step + 1][rank])]
            # In another order on each rank: each replica's own order is all that counts.
            sum(losses[:: 1 if rank == 0 else -1]).backward()
            assert_gradients(first.model, bytegrad(steps[step]), f"first, step {step}")
            assert_gradients(second.model, bytegrad(steps[step + 1], "bf16"), f"second, step {step}")


def test_two_replicas_in_one_backward():
    """Catches state or groups that two models share."""
    run_ranks(two_at_once, 2)


def attach_again(rank, world_size, nodes):
    for step in range(4):
        of_ranks = [few_kinds(r, step) for r in range(world_size)]
        with Training(GivenGradients(of_ranks[rank]), ByteGrad(hierarchical=True), nodes=nodes) as training:
            training.backward(of_ranks[rank])
            assert_gradients(training.model, bytegrad(of_ranks, nodes=nodes), f"replica {step}")


@pytest.mark.parametrize("nodes", [((0, 1),), ((0, 1), (2, 3))])
def test_one_replica_after_another(nodes):
    """Catches groups that take the name, and find the addresses, of groups that were closed before."""
    run_ranks(attach_again, sum(len(node) for node in nodes), nodes)
