"""What asynchronous averaging promises, of the specification itself; numbers are chosen so that arithmetic is exact."""

import random

import pytest
import torch

from lightning_accel.reference.async_average import AsyncAverage


def test_by_hand():
    """Catches a mean that is a sum, progress that is overwritten, and a correction that is applied twice."""
    ranks = AsyncAverage([torch.tensor([2.0]), torch.tensor([6.0])])
    ranks.step(0, torch.tensor([1.0]))
    ranks.average()
    assert [d.item() for d in ranks.d] == [2, -2]
    ranks.step(1, torch.tensor([10.0]))
    for rank in (0, 1, 0, 1):
        ranks.correct(rank)
    assert [x.item() for x in ranks.x] == [5, 14]
    ranks.consensus()
    assert [x.item() for x in ranks.x] == [9.5, 9.5]


@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize("seed", range(5))
def test_no_step_is_lost_or_counted_twice(world_size, seed):
    """Catches a specification under which the order of events matters for the sum of all weights."""
    chance = random.Random(seed)
    starts = [torch.tensor([float(chance.randrange(64))], dtype=torch.float64) for _ in range(world_size)]
    ranks = AsyncAverage(starts)
    total, own = sum(starts).item(), [start.item() for start in starts]
    corrections = [0.0] * world_size
    for _ in range(40):
        event, rank = chance.choice(["step", "step", "snapshot", "average", "correct"]), chance.randrange(world_size)
        if event == "average":
            ranks.average()
        elif event == "step":
            update = float(chance.randrange(-8, 8))
            ranks.step(rank, torch.tensor([update], dtype=torch.float64))
            total, own[rank] = total + update, own[rank] + update
        else:
            corrections[rank] += ranks.d[rank].item()
            ranks.correct(rank)
            if event == "snapshot":
                ranks.snapshot(rank)
        assert sum(x + d for x, d in zip(ranks.x, ranks.d, strict=True)).item() == total
        for r in range(world_size):
            assert ranks.x[r].item() == own[r] + corrections[r]
    ranks.consensus()
    assert [x.item() for x in ranks.x] == [total / world_size] * world_size


def test_a_rank_that_gives_no_snapshot_is_answered_for():
    """Catches a contribution of nothing, or of old weights whose corrections are on their way: both would count twice."""
    ranks = AsyncAverage([torch.tensor([0.0]), torch.tensor([8.0])])
    for update in (4.0, 8.0, 16.0):
        ranks.step(0, torch.tensor([update]))
        ranks.correct(0)
        ranks.snapshot(0)
        ranks.average()
    ranks.correct(0)
    assert ranks.x[1].item() == 8
    ranks.correct(1)
    # Means: (4 + 8)/2 = 6, then (6 + 8 + 6)/2 = 10, then (10 + 16 + 10)/2 = 18.
    assert [x.item() for x in ranks.x] == [18, 18]
