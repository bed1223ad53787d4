"""Algorithms that exchange weights, under Lightning: what is evaluated and saved is one model, equal on all ranks."""

import itertools
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import (
    EarlyStopping,
    EMAWeightAveraging,
    ModelCheckpoint,
    StochasticWeightAveraging,
)
from lightning.pytorch.plugins import MixedPrecision
from lightning_fits import FEATURES, Net, Points, fit, points, trainer, weights
from torch.utils.data import DistributedSampler

from helpers.ranks import run_ranks
from helpers.tensors import assert_same_bits
from lightning_accel import AccelStrategy
from lightning_accel.reference.decentralized import decentralized

TIMEOUT = timedelta(seconds=40)
OPTIONS = [
    {"algorithm": "decentralized", "peer_selection_mode": "shift_one", "communication_interval": 2},
    {"algorithm": "low_precision_decentralized", "codec": "int8"},
]


class Witness(Net):
    """Keeps the weights and the buffer that validation and files see."""

    def __init__(self, *, norm: bool = False) -> None:
        super().__init__()
        if norm:
            self.net.insert(0, torch.nn.BatchNorm1d(FEATURES))
        self.validated: list[torch.Tensor] = []
        self.saved: list[torch.Tensor] = []

    def state(self) -> torch.Tensor:
        return torch.cat([tensor.detach().double().flatten() for tensor in self.state_dict().values()])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        super().validation_step(batch, batch_idx)
        if batch_idx == 0:
            self.validated.append(self.state())

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.saved.append(torch.cat([tensor.double().flatten() for tensor in checkpoint["state_dict"].values()]))


class Overflowing(Witness):
    """The loss is infinite on rank 1 in two batches; gradients stay local, so only rank 1 skips the step."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        return loss * float("inf") if self.global_rank == 1 and batch_idx in (1, 4) else loss


class TwoOptimizers(Witness):
    """Manual optimisation, as in a GAN."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        for optimizer in self.optimizers():
            optimizer.zero_grad()
            self.manual_backward(self.loss(batch))
            optimizer.step()

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(part.parameters(), 0.05) for part in (self.net[0], self.net[2])]


class WithLBFGS(Net):
    def configure_optimizers(self) -> Any:
        return torch.optim.LBFGS(self.parameters())


def _fits(rank: int, world_size: int, options: dict[str, Any], folder: str) -> dict[str, Any]:
    seen: dict[str, Any] = {}

    def run(name: str, module: Net, steps: int, **kwargs: Any) -> Any:
        strategy = AccelStrategy(timeout=TIMEOUT, **options)
        runner = trainer(strategy, rank, world_size, limit_val_batches=1, **kwargs)
        rounds = []
        module.on_train_end = lambda: rounds.append(strategy._replica.algorithm.rounds)
        runner.fit(module, points(steps, world_size), points(4, world_size))
        seen[name] = {
            "validated": module.validated,
            "saved": module.saved,
            "history": module.history,
            "end": module.state(),
            "rounds": rounds[0],
        }
        return runner

    by_steps = ModelCheckpoint(Path(folder) / "steps", every_n_train_steps=3, save_top_k=-1)
    by_metric = ModelCheckpoint(Path(folder) / "metric", monitor="val_loss", save_top_k=1, save_last=True)
    stopping = EarlyStopping("val_loss", patience=50)
    callbacks = [by_steps, by_metric, stopping]
    # A sanity check before, and validation between micro-batches.
    run(
        "files",
        Witness(norm=True),
        16,
        accumulate_grad_batches=4,
        val_check_interval=2,
        max_epochs=2,
        enable_checkpointing=True,
        callbacks=callbacks,
    )
    seen["best"] = by_metric.best_model_path
    for name, callback in (("SWA", StochasticWeightAveraging(0.05, swa_epoch_start=1)), ("EMA", EMAWeightAveraging(decay=0.9))):
        run(name, Witness(norm=True), 4, max_epochs=3, callbacks=[callback])
    run("two optimizers", TwoOptimizers(), 5)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8, growth_interval=1000)
    run("skipped", Overflowing(), 6, plugins=[MixedPrecision("16-mixed", "cpu", scaler=scaler)])
    with pytest.raises(ValueError, match="LBFGS tries several weights"):
        fit(AccelStrategy(timeout=TIMEOUT, **options), rank, world_size, WithLBFGS(), 2)
    return seen


@pytest.fixture(scope="module", params=OPTIONS, ids=lambda options: options["algorithm"])
def fits(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_ranks(_fits, 2, request.param, str(tmp_path_factory.mktemp("files")))


def test_one_model_is_evaluated_and_saved(fits: Any) -> None:
    """Catches a consensus that is missing or comes too late, and one that is taken once only and then remembered."""
    first, second = (seen["files"] for seen in fits)
    assert len(first["validated"]) == 1 + 16  # the sanity check, and every second batch of two epochs
    assert len(first["saved"]) > 2
    for name in ("validated", "saved"):
        for mine, others in zip(first[name], second[name], strict=True):
            assert_same_bits(mine, others, name)
        assert all(not torch.equal(*pair) for pair in itertools.pairwise(first["validated"][1::2]))
    # SWA has an epoch more, for BatchNorm's statistics.
    assert first["rounds"] == second["rounds"] == 8
    assert_same_bits(first["end"], second["end"], "end of fit")
    # The best file holds a model that was validated.
    saved = torch.load(fits[0]["best"], weights_only=True)["state_dict"]
    flat = torch.cat([tensor.double().flatten() for tensor in saved.values()])
    assert any(torch.equal(flat, validated) for validated in first["validated"])


@pytest.mark.parametrize("name", ["SWA", "EMA", "two optimizers", "skipped"])
def test_callbacks_and_loops(fits: Any, name: str) -> None:
    """Catches a hang when one rank skips a step, averages of weights that are each rank's own, and a second optimizer that
    exchanges."""
    first, second = (seen[name] for seen in fits)
    assert_same_bits(first["end"], second["end"], "end of fit")
    assert first["end"].isfinite().all()
    # SWA has an epoch more, for BatchNorm's statistics.
    assert first["rounds"] == second["rounds"] == {"SWA": 12 + 1, "EMA": 12, "two optimizers": 5, "skipped": 6}[name]
    for mine, others in zip(first["validated"], second["validated"], strict=True):
        assert_same_bits(mine, others, "validated")
    # Between one consensus and the next the ranks' weights are their own.
    assert any(not torch.equal(*pair) for pair in zip(first["history"], second["history"], strict=True))


def _fit(rank: int, world_size: int) -> list[torch.Tensor]:
    return fit("accel_decentralized", rank, world_size, steps=8).history


def test_a_fit_is_the_specified_one() -> None:
    """Catches a mean at another moment than between backward and step, when Lightning runs both inside of the optimizer."""
    modules = [Net(), Net()]
    optimizers = [module.configure_optimizers() for module in modules]
    data = Points(32)
    orders = [list(DistributedSampler(data, 2, rank)) for rank in range(2)]  # as Lightning makes it
    histories = run_ranks(_fit, 2)
    for step in range(8):
        sent = [[parameter.detach().clone() for parameter in module.parameters()] for module in modules]
        for rank, module in enumerate(modules):
            places = orders[rank][2 * step : 2 * step + 2]
            module.loss((data.inputs[places], data.targets[places])).backward()
        for module, optimizer, means in zip(modules, optimizers, decentralized(sent, step), strict=True):
            with torch.no_grad():
                for parameter, mean in zip(module.parameters(), means, strict=True):
                    parameter.copy_(mean)
            optimizer.step()
            optimizer.zero_grad()
        for rank, module in enumerate(modules):
            assert_same_bits(histories[rank][step], weights(module), f"rank {rank}, step {step}")
