"""Error feedback under manual optimisation: every rank against the specification, to the bit."""

from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning_fits import fit

from helpers.models import GivenGradients, assert_gradients
from helpers.ranks import run_ranks
from helpers.tensors import normal
from lightning_accel import AccelStrategy, CommunicationError
from lightning_accel.reference.bytegrad import Gradients

NUMELS = (700, 1500)
STEPS = 6


class Turns(pl.LightningModule):
    """Two toggled optimizers that take turns, as in a GAN, each with two synchronised backwards; one of them skips a step."""

    def __init__(self, rank: int, world_size: int, codec: str, views: bool) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.model = GivenGradients([torch.zeros(numel) for numel in NUMELS])
        self.of_rank, self.num_ranks = rank, world_size
        self.expected = Gradients([torch.zeros(numel) for numel in NUMELS], world_size, codec, views=views)
        self.num_compared = 0

    def training_step(self, batch: Any, batch_idx: int) -> None:
        for place, optimizer in enumerate(self.optimizers()):
            self.toggle_optimizer(optimizer)
            set_to_none = batch_idx % 2 == 0
            optimizer.zero_grad(set_to_none=set_to_none)
            self.expected.zero([place], set_to_none=set_to_none)
            for k in range(2):
                of_ranks: list[list[torch.Tensor | None]] = [[None, None] for _ in range(self.num_ranks)]
                for r, own in enumerate(of_ranks):
                    own[place] = normal(NUMELS[place], torch.float32, seed=100 * batch_idx + 10 * r + 2 * place + k)
                self.manual_backward(self.model(of_ranks[self.of_rank]))
                self.expected.backward(of_ranks)
                what = f"batch {batch_idx}, optimizer {place}, backward {k}"
                assert_gradients(self.model, self.expected.of_ranks[self.of_rank], what)
                self.num_compared += 1
            if (batch_idx, place) != (2, 1):
                optimizer.step()
                self.expected.step([place])
            self.untoggle_optimizer(optimizer)

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD([parameter], 1e-3) for parameter in self.model.parameters()]


def take_turns(rank: int, world_size: int, codec: str) -> None:
    for views in (False, True):
        strategy = AccelStrategy(
            "bytegrad", codec=codec, error_feedback=True, find_unused_parameters=True, gradient_as_bucket_view=views
        )
        module = fit(strategy, rank, world_size, Turns(rank, world_size, codec, views), STEPS)
        assert module.num_compared == 4 * STEPS


@pytest.mark.parametrize(("world_size", "codec"), [(2, "int4"), (2, "int8"), (3, "sign")])
def test_toggled_optimizers_lose_nothing(world_size: int, codec: str) -> None:
    """Catches residuals that are added once a backward, and those of toggled parameters that are lost or taken up for nothing."""
    run_ranks(take_turns, world_size, codec)


class Sparse(pl.LightningModule):
    """A model whose gradients cannot be coded."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.rows = torch.nn.Embedding(3, 2, sparse=True)

    def training_step(self, batch: Any, batch_idx: int) -> None:
        self.manual_backward(self.rows(torch.tensor([0, 1])).sum())

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 1e-3)


def fail_after_backward(rank: int, world_size: int) -> None:
    with pytest.raises(CommunicationError, match="only dense gradients can be coded"):
        fit(AccelStrategy("bytegrad", static_graph=True), rank, world_size, Sparse(), 2)


def test_a_bucket_that_fails_after_the_backward_is_heard() -> None:
    """Catches a failure that no rank hears of where DDP hands over buckets outside of a backward, with a static graph."""
    run_ranks(fail_after_backward, 2)
