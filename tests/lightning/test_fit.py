"""Trainers with our strategy against the same with Lightning's own DDPStrategy, on two ranks."""

import inspect
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.strategies import DDPStrategy
from lightning_fits import CLASSES, FEATURES, HIDDEN, NUMEL, Net, Points, fit, points, trainer, weights

from helpers.ranks import own_threads, run_ranks
from lightning_accel import AccelStrategy
from lightning_accel.compression.block_layout import BLOCK_NUMEL

STEPS = 20


class TwoHeads(Net):
    """Uses one of two heads, another one on each rank at times: some parameters get no gradient."""

    def __init__(self) -> None:
        super().__init__()
        generator_state = torch.get_rng_state()
        torch.manual_seed(8)
        self.other = torch.nn.Linear(HIDDEN, CLASSES)
        torch.set_rng_state(generator_state)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if batch_idx % 3 == 0 or (batch_idx % 3 == 1 and self.global_rank == 1):
            return super().training_step(batch, batch_idx)
        return torch.nn.functional.mse_loss(self.other(self.net[:2](batch[0])), batch[1])


class Gan(Net):
    """Manual optimisation with two optimizers that take turns in every batch, each with its own backward."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.discriminator = torch.nn.Linear(CLASSES, 1)
        with torch.no_grad():
            self.discriminator.weight.fill_(0.1)
            self.discriminator.bias.zero_()

    def training_step(self, batch: Any, batch_idx: int) -> None:
        of_generator, of_discriminator = self.optimizers()
        self.toggle_optimizer(of_generator)
        self.manual_backward(self.discriminator(self.net(batch[0])).square().mean() + self.loss(batch))
        self.clip_gradients(of_generator, gradient_clip_val=0.5, gradient_clip_algorithm="norm")
        of_generator.step()
        of_generator.zero_grad()
        self.untoggle_optimizer(of_generator)

        self.toggle_optimizer(of_discriminator)
        fake = self.discriminator(self.net(batch[0]).detach())
        self.manual_backward((self.discriminator(batch[1]) - 1).square().mean() + fake.square().mean())
        of_discriminator.step()
        of_discriminator.zero_grad()
        self.untoggle_optimizer(of_discriminator)

    def configure_optimizers(self) -> Any:
        return [
            torch.optim.SGD(self.net.parameters(), self.learning_rate),
            torch.optim.Adam(self.discriminator.parameters(), 0.01),
        ]


class Manual(Net):
    """Manual optimisation that accumulates without no_sync, as Lightning documents it."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers()
        self.manual_backward(self.loss(batch))
        if batch_idx % 2:
            optimizer.step()
            optimizer.zero_grad()


DEFAULTS = {
    name: parameter.default
    for name, parameter in inspect.signature(torch.nn.parallel.DistributedDataParallel.__init__).parameters.items()
    if name not in ("self", "module", "device_ids")
}
"""What LightningCLI gives."""

COMBINATIONS: dict[str, tuple[type[Net], dict[str, Any], dict[str, Any]]] = {
    "plain": (Net, {}, {}),
    "accumulation": (Net, {}, {"accumulate_grad_batches": 4}),
    "accumulation with a rest": (Net, {}, {"accumulate_grad_batches": 3}),
    "many buckets": (Net, {"bucket_cap_mb": 1e-4}, {}),
    "no bucket view": (Net, {"gradient_as_bucket_view": False, "bucket_cap_mb": 1e-4}, {"accumulate_grad_batches": 2}),
    "static graph": (Net, {"static_graph": True, "bucket_cap_mb": 1e-4}, {}),
    "manual optimisation": (Manual, {"bucket_cap_mb": 1e-4}, {}),
    "manual optimisation of a static graph": (Manual, {"static_graph": True, "bucket_cap_mb": 1e-4}, {}),
    "unused parameters": (TwoHeads, {"find_unused_parameters": True, "bucket_cap_mb": 1e-4}, {}),
    "clip norm": (Net, {}, {"gradient_clip_val": 0.3}),
    "clip value": (Net, {}, {"gradient_clip_val": 0.02, "gradient_clip_algorithm": "value"}),
    "bf16-mixed": (Net, {}, {"precision": "bf16-mixed"}),
    "64-true": (Net, {}, {"precision": "64-true"}),
    "two optimizers": (Gan, {"find_unused_parameters": True}, {}),
    "every default given": (Net, DEFAULTS, {}),
}
"""Model, arguments of the strategy, arguments of the Trainer."""


def _history(strategy: Any, rank: int, world_size: int, model: type[Net], steps: int, arguments: Any) -> torch.Tensor:
    module = fit(strategy, rank, world_size, model(), steps, **arguments)
    assert not isinstance(module.trainer_of_fit.strategy.model, torch.nn.parallel.DistributedDataParallel)
    return torch.stack(module.history)


def _compare_with_ddp(rank: int, world_size: int) -> dict[str, tuple[bool, float, bool]]:
    """For each combination: gradient_allreduce equals DDP after each step; bytegrad's distance; bytegrad's ranks agree."""
    results = {}
    for name, (model, options, arguments) in COMBINATIONS.items():
        steps = STEPS if name in ("plain", "accumulation") else 8
        expected = _history(DDPStrategy(**options), rank, world_size, model, steps, arguments)
        exact = _history(AccelStrategy("gradient_allreduce", **options), rank, world_size, model, steps, arguments)
        coded = _history(AccelStrategy("bytegrad", **options), rank, world_size, model, steps, arguments)
        assert (expected[0] != expected[-1]).any(), "the reference did not train"
        assert not torch.equal(coded, expected), "bytegrad did not code anything"
        others = [torch.empty_like(coded) for _ in range(world_size)]
        dist.all_gather(others, coded)
        distance = ((coded - expected).norm(dim=1) / expected.norm(dim=1)).max().item()
        results[name] = (torch.equal(exact, expected), distance, all(torch.equal(other, coded) for other in others))
    return results


@pytest.fixture(scope="module")
def compared() -> dict[str, tuple[bool, float, bool]]:
    return run_ranks(_compare_with_ddp, 2)[1]


@pytest.mark.parametrize("name", COMBINATIONS)
def test_gradient_allreduce_is_ddp_bit_for_bit(compared: Any, name: str) -> None:
    """Catches a hook that is not registered on the CPU, a mean taken twice or not at all, or reduced at the wrong micro-batch."""
    assert compared[name][0]


@pytest.mark.parametrize("name", COMBINATIONS)
def test_bytegrad_stays_close_to_ddp_and_ranks_agree(compared: Any, name: str) -> None:
    """Catches gradients of the wrong parameter or bucket, a mean that is a sum, and ranks that drift apart."""
    _, distance, ranks_agree = compared[name]
    assert distance < 1e-2
    assert ranks_agree


class OneBatch(Net):
    """Takes the same batch in every step, one of its own on each rank, with a step as long as the gradient."""

    def __init__(self, rank: int) -> None:
        super().__init__(learning_rate=1.0)
        data = Points(4)
        self.batch = (data.inputs[2 * rank : 2 * rank + 2], data.targets[2 * rank : 2 * rank + 2])

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return self.loss(self.batch)


def _one_step(rank: int, world_size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The error of bytegrad's first step, its bound, and the error where there is nothing to quantise: all ranks on a node."""
    module = OneBatch(rank)
    module.training_step(None, 0).backward()
    bounds = []
    for own in (parameter.grad.flatten() for parameter in module.parameters()):
        gradients = [torch.empty_like(own) for _ in range(world_size)]
        dist.all_gather(gradients, own)
        mean = sum(gradients) / world_size
        first = sum(_absmax_of_blocks(gradient) for gradient in gradients) / 127 / 2 / world_size
        second = (_absmax_of_blocks(mean) + first) / 127 / 2  # of the mean as decoded, which may have grown by `first`
        rounding = 8 * torch.finfo(torch.float32).eps  # of sums, and of weights below 1 that gradients are read from
        bounds.append((first + second) * (1 + 2**-16) + rounding)
    without = fit("ddp", rank, world_size, OneBatch(rank), 1)
    coded = fit("accel_bytegrad", rank, world_size, OneBatch(rank), 1)
    uncoded = fit(AccelStrategy("bytegrad", hierarchical=True), rank, world_size, OneBatch(rank), 1)
    return weights(coded) - weights(without), torch.cat(bounds), weights(uncoded) - weights(without)


def _absmax_of_blocks(flat: torch.Tensor) -> torch.Tensor:
    """For each element the largest magnitude in its block."""
    return torch.cat([block.abs().max().expand(len(block)) for block in flat.split(BLOCK_NUMEL)])


def _everything_else(rank: int, world_size: int) -> dict[str, Any]:
    facts: dict[str, Any] = {"one step": _one_step(rank, world_size)}
    facts["stages"] = {name: _stages(rank, world_size, name) for name in ("accel", "accel_bytegrad")}
    facts["collectives"] = fit("accel", rank, world_size, Collectives(), 1).facts
    facts["compiled"] = [_compiled(rank, world_size, strategy) for strategy in ("ddp", "accel", "accel_bytegrad")]
    facts["statistics"] = [
        fit(name, rank, world_size, Net(), STEPS).trainer_of_fit.strategy.statistics for name in ("accel", "accel_bytegrad")
    ]
    return facts


class Collectives(Net):
    """Calls the strategy's own collectives, while the algorithm's are at work."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        strategy, mine = self.trainer.strategy, float(self.global_rank)
        strategy.barrier("anything")
        self.facts = {
            "mean": strategy.reduce(torch.tensor(mine + 1)).item(),
            "sum": strategy.reduce(torch.tensor(mine + 1), reduce_op="sum").item(),
            "gathered": strategy.all_gather(torch.tensor([mine])).tolist(),
            "broadcast": strategy.broadcast({"from": mine}, src=1),
            "decision": strategy.reduce_boolean_decision(self.global_rank == 0, all=False),
        }
        return super().training_step(batch, batch_idx)


def _stages(rank: int, world_size: int, strategy: str) -> dict[str, Any]:
    """All of a Trainer's entry points with one Trainer, and fit twice."""
    module, runner = Net(), trainer(strategy, rank, world_size, limit_val_batches=2, num_sanity_val_steps=1)
    data = points(4, world_size)
    runner.fit(module, data, data)
    once = weights(module)
    validated = runner.validate(module, data, verbose=False)[0]["val_loss"]
    tested = runner.test(module, data, verbose=False)[0]["test_loss"]
    predicted = runner.predict(module, data)
    runner.fit_loop.max_epochs = 2
    runner.fit(module, data, data)
    assert not own_threads()
    fresh = fit(strategy, rank, world_size, Net(), 4)
    return {
        "validated": validated,
        "tested": tested,
        "predicted": torch.cat(predicted).shape,
        "fresh fit is the first again": torch.equal(weights(fresh), once),
        "second fit trained": not torch.equal(weights(module), once),
        "weights": weights(module),
    }


def _compiled(rank: int, world_size: int, strategy: str) -> torch.Tensor:
    module = Net()
    runner = trainer(strategy, rank, world_size)
    runner.fit(torch.compile(module, backend="aot_eager"), points(STEPS, world_size))
    return weights(module)


@pytest.fixture(scope="module")
def facts() -> list[dict[str, Any]]:
    return run_ranks(_everything_else, 2)


def test_first_step_of_bytegrad_is_within_the_bound_of_two_roundings(facts: Any) -> None:
    """Catches a third quantisation, scales that blocks or parameters share, and codes that are not rounded to nearest."""
    for error, bound, _ in (rank_facts["one step"] for rank_facts in facts):
        assert error.numel() == NUMEL
        assert error.abs().max() > 0
        assert (error.abs() <= bound).all()


def test_bytegrad_quantises_nothing_inside_one_node(facts: Any) -> None:
    """Catches `hierarchical=True` that does not reach the algorithm: then the step would have bytegrad's rounding error."""
    for _, _, error in (rank_facts["one step"] for rank_facts in facts):
        assert (error == 0).all()


@pytest.mark.parametrize("name", ["accel", "accel_bytegrad"])
def test_all_stages_and_a_second_fit(facts: Any, name: str) -> None:
    """Catches state of one fit that reaches into the next, groups that cannot be made twice, and stages without a replica."""
    first, second = (rank_facts["stages"][name] for rank_facts in facts)
    for stages in (first, second):
        assert stages["fresh fit is the first again"]
        assert stages["second fit trained"]
        assert stages["predicted"] == (8, CLASSES)
    assert torch.equal(first["weights"], second["weights"])
    assert first["validated"] == second["validated"]
    assert first["tested"] == second["tested"]


def test_the_strategys_own_collectives(facts: Any) -> None:
    """Catches a strategy that puts its own traffic in the way of Lightning's on the default group."""
    for rank_facts in facts:
        assert rank_facts["collectives"] == {
            "mean": 1.5,
            "sum": 3.0,
            "gathered": [[0.0], [1.0]],
            "broadcast": {"from": 1.0},
            "decision": True,
        }


def test_a_compiled_module_trains_as_with_ddp(facts: Any) -> None:
    """Catches a strategy that Lightning refuses to compile with, and hooks that torch.compile traces away."""
    for ddp, accel, bytegrad in (rank_facts["compiled"] for rank_facts in facts):
        assert torch.equal(ddp, accel)
        assert not torch.equal(ddp, bytegrad)
        assert (ddp - bytegrad).norm() < 1e-2 * ddp.norm()
    assert torch.equal(facts[0]["compiled"][2], facts[1]["compiled"][2])


def test_statistics_count_one_fit_and_outlive_it(facts: Any) -> None:
    """Catches counters that are lost with the teardown, and bytes counted twice or for another world size."""
    for rank, (allreduce, bytegrad) in enumerate(rank_facts["statistics"] for rank_facts in facts):
        assert allreduce.full_precision_bytes == STEPS * 4 * NUMEL  # 2 (n-1)/n times float32, n = 2
        order_of_buckets = allreduce.sent_bytes - allreduce.full_precision_bytes  # which DDP on rank 0 tells the others once
        assert 0 < order_of_buckets < 64 if rank == 0 else order_of_buckets == 0
        assert bytegrad.full_precision_bytes == STEPS * 4 * NUMEL
        # One byte an element and a scale for each block of 512, equal messages: both ranks' are those of the larger one.
        assert STEPS * NUMEL <= bytegrad.sent_bytes < STEPS * 2 * NUMEL


def _one_device(rank: int, world_size: int) -> dict[str, torch.Tensor]:
    return {name: weights(fit(name, rank, world_size)) for name in ("ddp", "accel", "accel_bytegrad")}


def test_on_one_device_gradients_stay_as_they_are() -> None:
    """Catches bytegrad that quantises where there is nobody to send to, and groups that one rank alone cannot make."""
    (trained,) = run_ranks(_one_device, 1)
    assert torch.equal(trained["accel"], trained["ddp"])
    assert torch.equal(trained["accel_bytegrad"], trained["ddp"])


def test_synchronised_batch_norm_is_applied() -> None:
    """Catches a strategy that drops Lightning's layer_sync; SyncBatchNorm itself refuses to run on the CPU."""
    strategy = AccelStrategy("bytegrad")
    pl.Trainer(strategy=strategy, accelerator="cpu", devices=2, sync_batchnorm=True, logger=False, enable_checkpointing=False)
    model = torch.nn.Sequential(torch.nn.Linear(FEATURES, 4), torch.nn.BatchNorm1d(4))
    assert isinstance(strategy._layer_sync.apply(model)[1], torch.nn.SyncBatchNorm)
