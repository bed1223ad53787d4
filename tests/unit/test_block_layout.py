"""Blocks and their owners."""

import random

import pytest

from lightning_accel.compression.block_layout import BLOCK_NUMEL, Layout, num_blocks


def random_sizes(seed: int) -> list[int]:
    """Sizes as models have them: many small, some large, ragged, exact multiples, empty ones."""
    choose = random.Random(seed)
    kinds = [
        lambda: 0,
        lambda: choose.randrange(1, BLOCK_NUMEL),
        lambda: BLOCK_NUMEL * choose.randrange(1, 9),
        lambda: choose.randrange(1, 40 * BLOCK_NUMEL),
    ]
    return [choose.choice(kinds)() for _ in range(choose.randrange(1, 30))]


def blocks_of(numel: int) -> int:
    return (numel + BLOCK_NUMEL - 1) // BLOCK_NUMEL


@pytest.mark.parametrize("numel", [0, 1, 511, 512, 513, 1024, 99_991])
def test_num_blocks_counts_the_short_one(numel):
    """Catches a count that drops the last, short block."""
    assert num_blocks(numel) == len(range(0, numel, 512))


@pytest.mark.parametrize("owners", [1, 2, 3, 4, 7, 16])
def test_runs_cover_each_parameter_once_in_order(owners):
    """Catches a lost tail, an overlap, a run that is cut inside a block, and an owner that does not exist."""
    for seed in range(60):
        sizes = random_sizes(seed)
        layout = Layout(sizes, owners)
        for parameter, numel in enumerate(sizes):
            end = 0
            for span in layout.spans(parameter):
                assert span.start == end
                assert span.start % BLOCK_NUMEL == 0
                assert span.numel > 0
                assert 0 <= span.owner < owners
                end = span.start + span.numel
            assert end == numel


@pytest.mark.parametrize("owners", [2, 3, 4, 7, 16])
def test_deal_is_balanced_over_the_model_and_over_any_stretch_of_it(owners):
    """Catches left-over blocks that always go to rank 0: then one rank's message, and with it all, would grow."""
    for seed in range(30):
        sizes = random_sizes(seed)
        layout = Layout(sizes, owners)
        counts = [[0] * owners for _ in sizes]
        for parameter in range(len(sizes)):
            for span in layout.spans(parameter):
                counts[parameter][span.owner] += blocks_of(span.numel)
        for first in range(len(sizes)):
            for last in range(first, len(sizes)):
                of_stretch = [sum(counts[p][owner] for p in range(first, last + 1)) for owner in range(owners)]
                allowed = 1 if first == 0 else 2
                assert max(of_stretch) - min(of_stretch) <= allowed, (first, last, of_stretch)


def test_ownership_depends_on_the_parameters_alone():
    """Catches ownership that changes with what was asked before, or with the parameters that come after."""
    for seed in range(30):
        sizes = random_sizes(seed)
        layout, again = Layout(sizes, 3), Layout([*sizes, 4711], 3)
        backwards = [layout.spans(parameter) for parameter in reversed(range(len(sizes)))][::-1]
        assert backwards == [again.spans(parameter) for parameter in range(len(sizes))]


@pytest.mark.parametrize("owners", [1, 2, 3, 7])
def test_places_are_dense_and_in_order(owners):
    """Catches residuals of two blocks in one place, and memory for blocks that are another rank's."""
    for seed in range(60):
        sizes = random_sizes(seed)
        layout = Layout(sizes, owners)
        end, owned_ends = 0, [0] * owners
        for parameter in range(len(sizes)):
            for span in layout.spans(parameter):
                assert (span.place, span.owned_place) == (end, owned_ends[span.owner])
                end += span.numel
                owned_ends[span.owner] += span.numel
        assert (layout.numel, layout.owned_numels) == (end, owned_ends)


@pytest.mark.parametrize(("owners", "inner"), [(1, 2), (2, 1), (2, 2), (3, 4), (8, 2)])
def test_shares_cover_each_run_by_whole_blocks(owners, inner):
    """Catches an inner cut that shifts block borders: quantisation would then depend on the number of nodes."""
    for seed in range(60):
        sizes = random_sizes(seed)
        layout = Layout(sizes, owners)
        shares = [layout.share(owner, inner) for owner in range(owners)]
        for parameter in range(len(sizes)):
            for span in layout.spans(parameter):
                end = 0
                for part in shares[span.owner].spans(parameter):
                    assert part.start == end
                    assert part.start % BLOCK_NUMEL == 0
                    assert 0 <= part.owner < inner
                    end = part.start + part.numel
                assert end == span.numel
        assert sum(share.numel for share in shares) == sum(sizes)


@pytest.mark.parametrize(("owners", "inner"), [(2, 2), (4, 2), (2, 4), (3, 2)])
def test_shares_are_dealt_evenly(owners, inner):
    """Catches inner left-overs that always fall to the same node: equal messages would all grow to that one's size."""
    for seed in range(60):
        sizes = random_sizes(seed)
        layout = Layout(sizes, owners)
        for owner in range(owners):
            share = layout.share(owner, inner)
            counts = [0] * inner
            for parameter in range(len(sizes)):
                for part in share.spans(parameter):
                    counts[part.owner] += blocks_of(part.numel)
            assert max(counts) - min(counts) <= 1, counts


def test_deal_by_hand():
    """Pins the deal: a change of it changes the results of runs that were started before."""
    layout = Layout([512, 5 * 512 + 10, 3 * 512, 100, 0], 4)
    assert [(span.owner, span.start, span.numel) for span in layout.spans(1)] == [
        (0, 0, 512),
        (1, 512, 1024),
        (2, 1536, 1024),
        (3, 2560, 10),
    ]
    assert [(span.owner, span.start, span.numel) for span in layout.spans(3)] == [(2, 0, 100)]
    assert layout.spans(4) == []
