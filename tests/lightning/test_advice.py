"""Errors that advise another call: what they advise trains with the algorithm that the user has chosen."""

import multiprocessing
import re
from typing import Any

import lightning.fabric
import lightning.pytorch
import lightning_fits as fits
import pytest
import torch
from lightning.pytorch.strategies import StrategyRegistry

import lightning_accel as accel
import lightning_accel.fabric
from helpers.ranks import run_ranks
from lightning_accel.strategy.advice import respell
from lightning_accel_autoload import strategy_names

WAYS = {
    "name": ("accel_bytegrad", "Trainer(strategy='accel_bytegrad_find_unused_parameters_true')"),
    "other name": (
        "accel_find_unused_parameters_false",
        "Trainer(strategy='accel_find_unused_parameters_true')",
    ),
    "options": (
        {"algorithm": "bytegrad", "codec": "int4", "bucket_cap_mb": 3, "find_unused_parameters": False},
        "Trainer(strategy=AccelStrategy(algorithm='bytegrad', codec='int4', bucket_cap_mb=3, find_unused_parameters=True))",
    ),
    "algorithm": (
        {"algorithm": accel.Decentralized("all")},
        f"Trainer(strategy=AccelStrategy(algorithm={accel.Decentralized('all')!r}, find_unused_parameters=True))",
    ),
    "async": ("accel_async", "Trainer(strategy=AccelStrategy(algorithm='async', static_graph=True))"),
}
"""How the user has come to the strategy, and what to write instead."""


class Forgetful(torch.nn.Module):
    """Has a layer that no loss uses."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused = torch.nn.Linear(fits.FEATURES, fits.CLASSES), torch.nn.Linear(2, 2)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.used(inputs)


class ForgetfulNet(fits.Net):
    def __init__(self) -> None:
        super().__init__()
        self.net = Forgetful()


def _refused(call: Any) -> str:
    with pytest.raises(RuntimeError) as refused:
        call()
    return str(refused.value)


def _train_forgetful_models(rank: int, world_size: int) -> dict[str, str]:
    told = {}
    for way, (chosen, _) in WAYS.items():
        strategy = chosen if isinstance(chosen, str) else accel.AccelStrategy(**chosen)
        told[way] = _refused(lambda strategy=strategy: fits.fit(strategy, rank, world_size, ForgetfulNet(), steps=3))
    advised = accel.AccelStrategy(algorithm="async", static_graph=True)
    fits.fit(advised, rank, world_size, ForgetfulNet(), steps=3)

    plugins = [fits.Ranks(rank, world_size)]
    fabric = lightning.fabric.Fabric(strategy="accel_bytegrad", accelerator="cpu", devices=world_size, plugins=plugins)
    fabric.launch()
    module = fabric.setup_module(Forgetful())
    told["Fabric"] = _refused(lambda: [fabric.backward(module(torch.ones(1, fits.FEATURES)).sum()) for _ in range(2)])
    fabric.strategy.teardown()

    model = Forgetful()
    ddp = accel.wrap(model, torch.optim.SGD(model.parameters(), 0.1), "bytegrad", codec="int4")
    told["wrap"] = _refused(lambda: [ddp(torch.ones(1, fits.FEATURES)).sum().backward() for _ in range(2)])
    ddp.replica.close()
    return told


@pytest.fixture(scope="module")
def told() -> dict[str, str]:
    first, second = run_ranks(_train_forgetful_models, 2)
    assert first == second
    return first


@pytest.mark.parametrize("way", [*WAYS, "Fabric", "wrap"])
def test_advice_on_unused_parameters_keeps_the_algorithm(told: dict[str, str], way: str) -> None:
    """Catches DDP's and Lightning's own advice, which trains without the algorithm, or without its options."""
    others = {
        "Fabric": "Fabric(strategy='accel_bytegrad_find_unused_parameters_true')",
        "wrap": "wrap(model, optimizer, 'bytegrad', codec='int4', find_unused_parameters=True)",
    }
    advised = WAYS[way][1] if way in WAYS else others[way]
    assert f", write {advised}. " in told[way]
    assert re.search(r"gave no gradient to (net\.)?unused\.weight, (net\.)?unused\.bias, so", told[way])


@pytest.mark.parametrize("frontend", [lightning.pytorch.Trainer, lightning.fabric.Fabric], ids=["trainer", "fabric"])
def test_a_script_without_a_guard_is_told_to_keep_the_algorithm(monkeypatch: Any, frontend: Any) -> None:
    """Catches Lightning's advice to run with `strategy="ddp"`, in a process that was spawned and imports the script."""
    monkeypatch.setattr(multiprocessing.current_process(), "_inheriting", True, raising=False)
    made = frontend(strategy="accel_bytegrad_spawn", accelerator="cpu", devices=2)
    run = made.fit if frontend is lightning.pytorch.Trainer else made.launch
    with pytest.raises(RuntimeError, match=r'`if __name__ == "__main__":`, or write strategy=\'accel_bytegrad\'$'):
        run(fits.Net() if frontend is lightning.pytorch.Trainer else print)


def test_each_name_has_an_advice_that_is_a_name() -> None:
    """Catches an advice that nobody can follow, or that starts processes in another way."""
    for name, arguments in strategy_names().items():
        for start, changes in ((None, {"find_unused_parameters": True}), ("_notebook", {})):
            advised = eval(respell(StrategyRegistry.get(name), changes, start))
            method = {} if start is None else {"start_method": "fork"}
            assert strategy_names()[advised] == {**arguments, **changes, **method}
            assert "notebook" in advised or start is None


SHARDING = ("fsdp", "shard", "sharding_strategy", "cpu_offload", "auto_wrap_policy", "tensor_parallel_size")


@pytest.mark.parametrize("word", SHARDING)
def test_who_asks_for_sharding_hears_what_there_is(word: str) -> None:
    """Catches "unknown option" as the only answer to a wish that another strategy fulfils."""
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for make in (
        accel.AccelStrategy,
        lightning_accel.fabric.AccelStrategy,
        lambda *a, **k: accel.wrap(model, optimizer, *a, **k),
    ):
        for arguments, keywords in (((word,), {}), ((), {word: True})):
            with pytest.raises((TypeError, ValueError), match=f"'{word}'; nothing is sharded here.*fsdp.*fully_shard"):
                make(*arguments, **keywords)


def _set_up_sharded_models(rank: int, world_size: int) -> None:
    from torch.distributed.fsdp import fully_shard

    def sharded(module: torch.nn.Module) -> torch.nn.Module:
        return fully_shard(module, mesh=torch.distributed.init_device_mesh("cpu", (world_size,)))

    model = sharded(torch.nn.Linear(4, 4))
    with pytest.raises(TypeError, match=r"must be whole on each rank.* got the sharded parameter weight"):
        accel.wrap(model, torch.optim.SGD(model.parameters(), 0.1), "bytegrad")
    with pytest.raises(TypeError, match="must be whole on each rank"):
        fits.fit("accel_bytegrad", rank, world_size, sharded(fits.Net()), steps=1)


def test_a_sharded_model_is_refused() -> None:
    """Catches an error from deep inside DDP, or replicas of different parts of a model that are averaged."""
    run_ranks(_set_up_sharded_models, 2)


def test_wrap_before_joining_names_what_joins() -> None:
    """Catches torch's advice to call a function of the same name, which leaves the launcher's variables to the user."""
    model = torch.nn.Linear(2, 2)
    with pytest.raises(RuntimeError, match=r"call lightning_accel\.init_process_group\(\) before"):
        accel.wrap(model, torch.optim.SGD(model.parameters(), 0.1))
