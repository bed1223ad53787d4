"""qadam under Lightning: what fits, and what is refused before it starts."""

from typing import Any

import pytest
import torch
from lightning.fabric import Fabric
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning_fits import Net, Ranks, fit, points, weights

from helpers.ranks import run_ranks
from lightning_accel import AccelStrategy, QAdam
from lightning_accel.fabric import AccelStrategy as FabricStrategy
from lightning_accel.optim import Phase


class QAdamNet(Net):
    """With QAdam, a scheduler, and a count of the optimizer's phases after each step."""

    def __init__(self, optimizer: Any = QAdam, **options: Any) -> None:
        super().__init__()
        self.make_optimizer = lambda: optimizer(self.parameters(), **options)
        self.phases: list[Phase] = []

    def configure_optimizers(self) -> Any:
        optimizer = self.make_optimizer()
        return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)}

    def on_train_batch_end(self, *args: Any) -> None:
        super().on_train_batch_end()
        self.phases.append(getattr(self.optimizers(), "phase", None))


def _fits(rank: int, world_size: int) -> list[Any]:
    seen = []
    for accumulate in (1, 2):
        module = fit(
            AccelStrategy(algorithm="qadam", codec="int8"),
            rank,
            world_size,
            QAdamNet(lr=0.01, warmup_steps=4),
            accumulate_grad_batches=accumulate,
            max_epochs=2,
        )
        plain = fit(
            "ddp", rank, world_size, QAdamNet(torch.optim.Adam, lr=0.01), accumulate_grad_batches=accumulate, max_epochs=2
        )
        switch = 4 * accumulate
        assert module.phases[:switch] == [Phase.WARMUP] * switch
        assert module.phases[-1] is Phase.COMPRESSED
        for step in range(switch):
            assert torch.allclose(module.history[step], plain.history[step], rtol=0, atol=1e-6), step
        assert not torch.equal(module.history[-1], plain.history[-1])
        seen.append([weights(module), weights(plain)])
    return seen


def test_a_fit_goes_through_both_phases() -> None:
    """Catches a warm-up that is not Adam, steps counted in batches, a schedule that is not heard, ranks that part."""
    for first, second in zip(*run_ranks(_fits, 2), strict=True):
        assert torch.equal(first[0], second[0])
        start = weights(QAdamNet())
        assert (first[0] - first[1]).norm() < 0.5 * (first[1] - start).norm()


def _refused(rank: int, world_size: int) -> list[str]:
    messages = []
    cases = [
        (Net(), {}),
        (QAdamNet(), {"gradient_clip_val": 1.0}),
        (QAdamNet(), {"plugins": [MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu"))]}),
    ]
    for module, arguments in cases:
        with pytest.raises(ValueError) as refused:
            fit(AccelStrategy(algorithm="qadam"), rank, world_size, module, **arguments)
        messages.append(str(refused.value))
    return messages


def test_wrong_use_is_refused_at_set_up() -> None:
    """Catches a run that stops after its warm-up, hours later, or trains on clipped momentum."""
    for messages in run_ranks(_refused, 2):
        assert "needs lightning_accel.QAdam as every optimizer" in messages[0]
        assert "got SGD" in messages[0]
        assert "must not be clipped: got a bound of 1.0" in messages[1]
        assert "bf16-mixed" in messages[2]


def _without_the_algorithm(rank: int, world_size: int) -> torch.Tensor:
    with pytest.warns(UserWarning, match="plain Adam"):
        module = fit(AccelStrategy(), rank, world_size, QAdamNet(lr=0.01, warmup_steps=2), steps=6)
    plain = fit("ddp", rank, world_size, QAdamNet(torch.optim.Adam, lr=0.01), steps=6)
    assert torch.allclose(weights(module), weights(plain), rtol=0, atol=1e-6)
    return weights(module)


def test_qadam_without_its_algorithm_is_adam_and_says_so() -> None:
    run_ranks(_without_the_algorithm, 2)


class TwoOptimizers(Net):
    """Manual optimisation, each layer with an optimizer of its own, in turn."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def configure_optimizers(self) -> Any:
        return [QAdam(layer.parameters(), lr=0.01, warmup_steps=3) for layer in (self.net[0], self.net[2])]

    def training_step(self, batch: Any, batch_idx: int) -> None:
        for optimizer in self.optimizers():
            optimizer.zero_grad()
        self.manual_backward(self.loss(batch))
        for optimizer in self.optimizers():
            optimizer.step()


def _manual(rank: int, world_size: int) -> torch.Tensor:
    module = fit(AccelStrategy(algorithm="qadam", codec="sign"), rank, world_size, TwoOptimizers(), steps=10)
    assert [optimizer.phase for optimizer in module.trainer_of_fit.optimizers] == [Phase.COMPRESSED] * 2
    return weights(module)


def test_manual_optimisation_with_two_optimizers() -> None:
    first, second = run_ranks(_manual, 2)
    assert torch.equal(first, second)


def _bf16(rank: int, world_size: int) -> None:
    module = fit(AccelStrategy(algorithm="qadam"), rank, world_size, QAdamNet(warmup_steps=2), steps=5, precision="bf16-mixed")
    assert module.phases[-1] is Phase.COMPRESSED


def test_bf16_mixed_needs_no_scaler() -> None:
    run_ranks(_bf16, 2)


def _fabric(rank: int, world_size: int) -> torch.Tensor:
    fabric = Fabric(
        accelerator="cpu", devices=world_size, strategy=FabricStrategy(algorithm="qadam"), plugins=[Ranks(rank, world_size)]
    )
    fabric.launch()
    model = Net()
    with pytest.raises(ValueError, match="must not be clipped"):
        fabric.strategy.clip_gradients_norm(model, None, 1.0)
    module, optimizer = fabric.setup(model.net, QAdam(model.net.parameters(), lr=0.01, warmup_steps=3))
    for inputs, targets in fabric.setup_dataloaders(points(8, world_size)):
        optimizer.zero_grad()
        fabric.backward(torch.nn.functional.mse_loss(module(inputs), targets))
        optimizer.step()
    assert optimizer.optimizer.phase is Phase.COMPRESSED
    fabric.strategy.teardown()
    return weights(model)


def test_fabric() -> None:
    first, second = run_ranks(_fabric, 2)
    assert torch.equal(first, second)
