"""The two-shot all_reduce against its specification, with ranks as threads: any number of them, and no network."""

import math
import threading

import pytest
import torch

from helpers.tensors import CODECS, DTYPES, SIZES, assert_same_bits, awkward, normal
from lightning_accel.collectives.hierarchical import HierarchicalPlan, hierarchical_all_reduce_steps
from lightning_accel.collectives.message_plan import TwoShotPlan, pieces_of
from lightning_accel.collectives.sharded import all_gather_steps, finish, reduce_scatter_steps
from lightning_accel.collectives.two_shot import compressed_all_reduce
from lightning_accel.compression.block_layout import Layout
from lightning_accel.reference import collectives as reference
from lightning_accel.reference.codecs import canonical, quantise, value_dtype
from lightning_accel.transport.group import Group
from lightning_accel.transport.scratch import Scratch


class Mail:
    """Where the ranks of a group leave their messages."""

    def __init__(self, world_size: int) -> None:
        self.messages = [None] * world_size
        self.barrier = threading.Barrier(world_size, timeout=30)


class ThreadGroup(Group):
    def __init__(self, mail: Mail, rank: int) -> None:
        super().__init__(None)
        self.mail, self.rank, self.world_size = mail, rank, len(mail.messages)

    def all_to_all(self, received, sent, scratch):
        self.sent_bytes += sent.numel() // self.world_size * (self.world_size - 1)
        return self._exchange(received, sent, lambda message: message.view(self.world_size, -1)[self.rank])

    def all_gather(self, gathered, sent, scratch):
        self.sent_bytes += sent.numel() * (self.world_size - 1)
        return self._exchange(gathered, sent, lambda message: message)

    def _exchange(self, received, sent, part_of):
        self.mail.messages[self.rank] = sent
        self.mail.barrier.wait()
        everything = torch.cat([part_of(message) for message in self.mail.messages])
        self.mail.barrier.wait()
        return lambda: received.copy_(everything)


def on_ranks(world_size: int, work) -> list:
    """Calls work(rank) on a thread for each rank."""
    results, errors = [None] * world_size, []

    def run(rank: int) -> None:
        try:
            results[rank] = work(rank)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return results


def gradients(world_size: int, dtype: torch.dtype, sizes) -> list[list[torch.Tensor]]:
    """Of each rank, of each parameter; the last one is full of trouble."""
    ordinary = [
        [normal(numel, dtype, seed=100 * rank + place) for place, numel in enumerate(sizes)] for rank in range(world_size)
    ]
    return [[*tensors, awkward(dtype, rank).roll(rank * 700)] for rank, tensors in enumerate(ordinary)]


def places_in(tensors: list[torch.Tensor], order: list[int]) -> list[tuple[int, int]]:
    """Parameters in a bucket: (place in the model, first element in the bucket)."""
    places, offset = [], 0
    for parameter in order:
        places.append((parameter, offset))
        offset += tensors[parameter].numel()
    return places


def split_again(bucket: torch.Tensor, tensors: list[torch.Tensor], order: list[int]) -> dict[int, torch.Tensor]:
    parts = bucket.split([tensors[parameter].numel() for parameter in order])
    return dict(zip(order, parts, strict=True))


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 7, 16])
def test_flat_is_as_specified_on_every_rank(codec, world_size):
    """Catches a block that is summed by the wrong rank, lands in the wrong place or is quantised once or thrice."""
    for dtype in DTYPES if world_size <= 4 else [torch.float32]:
        of_ranks = gradients(world_size, dtype, (0, 1, 7, 511, 512, 513, 5003))
        order = [6, 3, 0, 7, 1, 5, 4, 2]
        layout = Layout([t.numel() for t in of_ranks[0]], world_size)
        mail = Mail(world_size)

        def work(rank, of_ranks=of_ranks, dtype=dtype, order=order, layout=layout, mail=mail):
            bucket = torch.cat([of_ranks[rank][parameter] for parameter in order])
            pieces = pieces_of(layout, places_in(of_ranks[rank], order))
            plan = TwoShotPlan.build(codec, dtype, pieces, world_size, rank)
            compressed_all_reduce(bucket, plan, ThreadGroup(mail, rank), Scratch(), divisor=world_size)
            return split_again(bucket, of_ranks[rank], order)

        for rank, results in enumerate(on_ranks(world_size, work)):
            for parameter, result in results.items():
                tensors = [tensors[parameter] for tensors in of_ranks]
                expected = reference.compressed_all_reduce(tensors, codec, world_size)
                assert_same_bits(result, expected, f"{dtype}, rank {rank}, parameter {parameter}")


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize(
    "nodes",
    [((0,),), ((0, 1),), ((0,), (1,)), ((0, 1), (2, 3)), ((0, 2), (1, 3)), ((0, 1, 2), (3, 4, 5)), ((0, 1), (2, 3), (4, 5))],
    ids=str,
)
def test_hierarchical_is_as_specified_on_every_rank(codec, nodes):
    """Catches a share that is cut inside a block, a sum in the order of global ranks, and quantisation inside a node."""
    world_size = sum(len(node) for node in nodes)
    for dtype in DTYPES:
        of_ranks = gradients(world_size, dtype, (0, 1, 513, 5003))
        order = [3, 4, 0, 1, 2]
        layout = Layout([t.numel() for t in of_ranks[0]], len(nodes[0]))
        node_mail = [Mail(len(node)) for node in nodes]
        peer_mail = [Mail(len(nodes)) for _ in nodes[0]]

        def work(rank, of_ranks=of_ranks, dtype=dtype, order=order, layout=layout, node_mail=node_mail, peer_mail=peer_mail):
            node_rank, local_rank = next((m, node.index(rank)) for m, node in enumerate(nodes) if rank in node)
            node = ThreadGroup(node_mail[node_rank], local_rank)
            peers = ThreadGroup(peer_mail[local_rank], node_rank)
            bucket = torch.cat([of_ranks[rank][parameter] for parameter in order])
            places = places_in(of_ranks[rank], order)
            plan = HierarchicalPlan.build(codec, dtype, layout, layout.share(local_rank, len(nodes)), places, node, peers)
            memory = Scratch(), Scratch(), Scratch()
            finish(hierarchical_all_reduce_steps(bucket, plan, node, peers, node, *memory, divisor=world_size))
            return split_again(bucket, of_ranks[rank], order)

        for rank, results in enumerate(on_ranks(world_size, work)):
            for parameter, result in results.items():
                tensors = [tensors[parameter] for tensors in of_ranks]
                expected = reference.hierarchical_all_reduce(tensors, nodes, codec, world_size)
                assert_same_bits(result, expected, f"{dtype}, rank {rank}, parameter {parameter}")


def whole(tensors: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors])


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_reduce_scatter_quantises_once(codec, world_size):
    """Catches a sum that is quantised again, is not in rank order, or belongs to another rank; and bytes beyond n-1 messages."""
    for dtype in DTYPES:
        of_ranks = gradients(world_size, dtype, (0, 1, 513, 5003))
        layout, mail = Layout([t.numel() for t in of_ranks[0]], world_size), Mail(world_size)
        pieces = pieces_of(layout, places_in(of_ranks[0], range(len(of_ranks[0]))))

        def work(rank, of_ranks=of_ranks, dtype=dtype, pieces=pieces, mail=mail):
            plan = TwoShotPlan.build(codec, dtype, pieces, world_size, rank, scatter=True)
            shard = torch.full((plan.shard_numel,), 7.0, dtype=plan.shard.value_dtype)
            group = ThreadGroup(mail, rank)
            finish(reduce_scatter_steps(whole(of_ranks[rank]), plan, shard, group, Scratch(), divisor=world_size))
            assert group.sent_bytes == (world_size - 1) * plan.stride_bytes
            return shard

        for rank, shard in enumerate(on_ranks(world_size, work)):
            start = 0
            for parameter in range(len(of_ranks[0])):
                coded = [quantise(tensors[parameter].to(shard.dtype), codec) for tensors in of_ranks]
                mean = torch.zeros_like(coded[0])
                for one in coded:
                    mean = mean + one
                for span in layout.spans(parameter):
                    if span.owner == rank:
                        expected = (mean / world_size)[span.start : span.start + span.numel]
                        got = shard[start : start + span.numel]
                        assert_same_bits(canonical(got), canonical(expected), f"{dtype}, rank {rank}, parameter {parameter}")
                        start += span.numel
            assert start == shard.numel()


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_all_gather_gives_all_ranks_the_same_bits(codec, world_size):
    """Catches a rank that keeps its own shard as it was, where the others see its code."""
    for dtype in DTYPES:
        parameters = gradients(1, dtype, (0, 1, 513, 5003))[0]
        layout, mail = Layout([t.numel() for t in parameters], world_size), Mail(world_size)
        pieces = pieces_of(layout, places_in(parameters, range(len(parameters))))

        def work(rank, parameters=parameters, dtype=dtype, pieces=pieces, mail=mail):
            plan = TwoShotPlan.build(codec, dtype, pieces, world_size, rank, scatter=True)
            own = [piece for piece in pieces if piece.span.owner == rank]
            values = whole(parameters)
            parts = [values[piece.tensor_offset : piece.tensor_offset + piece.span.numel] for piece in own]
            tensor, group = torch.zeros_like(values), ThreadGroup(mail, rank)
            finish(all_gather_steps(torch.cat([values[:0], *parts]), plan, tensor, group, Scratch()))
            assert group.sent_bytes == (world_size - 1) * plan.stride_bytes
            return tensor

        expected = [quantise(tensor.to(value_dtype(codec, dtype)), codec).to(dtype) for tensor in parameters]
        for rank, tensor in enumerate(on_ranks(world_size, work)):
            assert_same_bits(canonical(tensor), canonical(whole(expected)), f"{dtype}, rank {rank}")


def test_elements_outside_of_the_plan_keep_their_value():
    """Catches a result that is written to the tensor as a whole."""
    mail = Mail(2)

    def work(rank):
        tensor = torch.arange(3000.0) * (rank + 1)
        plan = TwoShotPlan.build("none", torch.float32, pieces_of(Layout([1000], 2), [(0, 1500)]), 2, rank)
        compressed_all_reduce(tensor, plan, ThreadGroup(mail, rank), Scratch(), divisor=1)
        return tensor

    for rank, tensor in enumerate(on_ranks(2, work)):
        expected = torch.arange(3000.0) * (rank + 1)
        expected[1500:2500] = torch.arange(3000.0)[1500:2500] * 3
        assert_same_bits(tensor, expected)


@pytest.mark.parametrize("world_size", [2, 4, 16])
def test_bytes_on_the_wire_are_as_documented(world_size):
    """Catches messages that are padded to more than the deal needs: the gain is the product.

    Two messages to each of n-1 others; a message holds 1/n of the blocks (one more at most), 512 codes and a scale each. Two
    ranks exchange one message with everything.
    """
    numel = 100_000
    mail = Mail(world_size)

    def work(rank):
        group = ThreadGroup(mail, rank)
        pieces = pieces_of(Layout([numel], world_size), [(0, 0)])
        plan = TwoShotPlan.build("int8", torch.float32, pieces, world_size, rank)
        compressed_all_reduce(torch.ones(numel), plan, group, Scratch(), divisor=world_size)
        return group.sent_bytes

    blocks = math.ceil(math.ceil(numel / 512) / world_size)
    scales = math.ceil(blocks * 4 / 16) * 16
    sent = numel + 2 * scales if world_size == 2 else 2 * (world_size - 1) * (blocks * 512 + scales)
    assert on_ranks(world_size, work) == [sent] * world_size


def test_unequal_parts_fit_into_equal_messages():
    """Catches a stride taken from this rank's own message, which differs from rank to rank."""
    pieces = pieces_of(Layout([5 * 512], 2), [(0, 0)])
    plans = [TwoShotPlan.build("int8", torch.float32, pieces, 2, rank, scatter=True) for rank in range(2)]
    assert plans[0].own.wire_bytes != plans[1].own.wire_bytes
    assert plans[0].stride_bytes == plans[1].stride_bytes == max(plan.own.wire_bytes for plan in plans)
    assert plans[0].everything.wire_offsets == plans[1].everything.wire_offsets


def test_scratch_grows_to_the_largest_and_stays():
    """Catches an allocation for each bucket."""
    scratch, cpu = Scratch(), torch.device("cpu")
    assert scratch.allocated_bytes == 0
    first = scratch.bytes("a", 100, cpu)
    assert first.numel() == 100
    assert scratch.allocated_bytes == 100
    assert scratch.bytes("a", 1000, cpu).numel() == 1000
    assert scratch.allocated_bytes == 1000
    address = scratch.bytes("a", 1000, cpu).data_ptr()
    for numel in (0, 7, 1000):
        again = scratch.bytes("a", numel, cpu)
        assert again.numel() == numel
        assert numel == 0 or again.data_ptr() == address
    assert scratch.allocated_bytes == 1000


def test_scratch_keeps_names_apart():
    """Catches one buffer under two names: a message would be overwritten while it is sent."""
    scratch, cpu = Scratch(), torch.device("cpu")
    first, second = scratch.bytes("a", 64, cpu), scratch.bytes("b", 64, cpu)
    first.fill_(1)
    second.fill_(2)
    assert (first == 1).all()
    assert scratch.allocated_bytes == 128


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scratch_holds_values(dtype):
    """Catches sizes counted in elements where bytes are meant."""
    values = Scratch().values("v", 77, dtype, torch.device("cpu"))
    assert values.shape == (77,)
    assert values.dtype == dtype
    values.fill_(1.0)


def test_scratch_is_aligned_for_messages():
    """Catches memory that the kernels would refuse."""
    scratch = Scratch()
    for numel in (1, 17, 4097):
        assert scratch.bytes(f"of {numel}", numel, torch.device("cpu")).data_ptr() % 16 == 0


def test_cleared_scratch_holds_nothing():
    """Catches memory of DDP's first, all-embracing bucket that stays for the whole run."""
    scratch = Scratch()
    scratch.bytes("a", 1000, torch.device("cpu"))
    scratch.clear()
    assert scratch.allocated_bytes == 0


def test_a_rank_by_itself_sends_nothing():
    """Catches a special case for one rank: it is quantised as with more, and counts no bytes."""
    group = Group(None)
    for numel in SIZES[:-1]:
        tensor = normal(numel, torch.float32, seed=numel)
        expected = reference.compressed_all_reduce([tensor], "int8", 1)
        plan = TwoShotPlan.build("int8", torch.float32, pieces_of(Layout([numel], 1), [(0, 0)]), 1, 0)
        compressed_all_reduce(tensor, plan, group, Scratch(), divisor=1)
        assert_same_bits(tensor, expected)
    assert group.sent_bytes == 0
