"""How the strategy's names resolve: in clean interpreters, with and without an import by the user, and through LightningCLI."""

import inspect
import json
import re
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import lightning.fabric
import lightning.pytorch as pl
import pytest
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.strategies import StrategyRegistry
from lightning_fits import Net, as_if_installed
from torch.nn.parallel import DistributedDataParallel

import lightning_accel
import lightning_accel.fabric
import lightning_accel_autoload
from lightning_accel import AccelStrategy

ALGORITHMS = ("gradient_allreduce", "bytegrad", "decentralized", "low_precision_decentralized", "qadam", "async")
OF_DDP = [name.removeprefix("ddp") for name in StrategyRegistry if name.startswith("ddp")]
NAMES = {
    name + end: {
        "algorithm": algorithm,
        "start_method": "spawn" if "spawn" in end else "fork" if "fork" in end or "notebook" in end else "popen",
        **({"find_unused_parameters": end.endswith("true")} if "unused" in end else {}),
    }
    for name, algorithm in [("accel", "gradient_allreduce"), *((f"accel_{algorithm}", algorithm) for algorithm in ALGORITHMS)]
    for end in OF_DDP
}
"""What each name stands for: for each algorithm the names that Lightning's `ddp` has."""

FACTS = """
import json, os, sys
import {root} as pl
root = pl.__name__
registry = sys.modules[root + ".strategies"].StrategyRegistry
facts = {{"package imported": "lightning_accel" in sys.modules}}

def trainer(strategy, **kwargs):
    try:
        made = pl.Trainer(strategy=strategy, accelerator="cpu", devices=2, logger=False, enable_checkpointing=False, **kwargs)
    except ValueError as error:
        return "ValueError: " + str(error)
    return describe(made.strategy)

def describe(strategy):
    assert isinstance(strategy, sys.modules[root + ".strategies"].DDPStrategy)
    arguments = {{"algorithm": strategy.algorithm.name, "start_method": strategy._start_method, **strategy._ddp_kwargs}}
    return [type(strategy).__module__, arguments]

names = [name for name in registry.available_strategies() if name.startswith("accel")]
facts["names"] = {{name: describe(registry.get(name)) for name in names}}
facts["trainers"] = {{name: trainer(name) for name in names if name.startswith("accel_qadam")}}
fabric = "lightning.fabric" if root == "lightning.pytorch" else "lightning_fabric"
fabric_registry = sys.modules[fabric + ".strategies"].STRATEGY_REGISTRY
facts["fabric"] = [name for name in fabric_registry.available_strategies() if name.startswith("accel")]
facts["accel"] = trainer("accel")
os.environ["PL_TRAINER_STRATEGY"] = "ACCEL_bytegrad"
try:
    facts["variable"] = pl.Trainer(logger=False, enable_checkpointing=False, accelerator="cpu").strategy.algorithm.name
except ValueError as error:
    facts["variable"] = "ValueError: " + str(error)
del os.environ["PL_TRAINER_STRATEGY"]
{more}
print("FACTS", json.dumps(facts))
"""

MORE_OF_LIGHTNING = """
import lightning_accel_autoload
from lightning_accel.algorithms import algorithm_names
facts["algorithms"] = [list(lightning_accel_autoload.ALGORITHMS), algorithm_names()]
"""

MORE_OF_PYTORCH_LIGHTNING = """
import lightning_accel
facts["class of the root in use"] = lightning_accel.AccelStrategy.__module__
import lightning_accel.fabric
facts["class of Fabric's root in use"] = lightning_accel.fabric.AccelStrategy.__module__
facts["instance"] = trainer(lightning_accel.AccelStrategy("bytegrad"))[0]
import lightning.pytorch as other
facts["another root, later"] = type(
    other.Trainer(strategy="accel", accelerator="cpu", devices=2, logger=False, enable_checkpointing=False).strategy
).__module__
"""

MORE_WITHOUT_AUTOLOAD = """
import lightning_accel
facts["after the import"] = trainer("accel_bytegrad")
lightning_accel.AccelStrategy.register_strategies(registry)
"""


def _interpreter(folder: Path, root: str, more: str, **variables: str) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", FACTS.format(root=root, more=more)],
        env={**as_if_installed(folder), **variables},
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.fixture(scope="module")
def interpreters(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Facts told by clean interpreters, in which nobody imports us."""
    folder = tmp_path_factory.mktemp("installed")
    processes = {
        "lightning": _interpreter(folder, "lightning.pytorch", MORE_OF_LIGHTNING),
        "pytorch_lightning": _interpreter(folder, "pytorch_lightning", MORE_OF_PYTORCH_LIGHTNING),
        "off": _interpreter(folder, "lightning.pytorch", MORE_WITHOUT_AUTOLOAD, TORCH_DEVICE_BACKEND_AUTOLOAD="0"),
    }
    facts = {}
    try:
        for name, process in processes.items():
            printed, errors = process.communicate(timeout=200)
            assert process.returncode == 0, errors
            facts[name] = json.loads(printed.split("FACTS ")[1])
    finally:
        for process in processes.values():
            process.kill()
            process.communicate()
    return facts


@pytest.mark.parametrize("root", ["lightning", "pytorch_lightning"])
def test_every_name_resolves_without_an_import(interpreters: Any, root: str) -> None:
    """Catches a name that is missing or means another algorithm, start method or flag; a class of the other root; and an
    autoload that imports the package for everybody who imports torch."""
    facts = interpreters[root]
    assert not facts["package imported"]
    assert len(OF_DDP) == 12
    defaults = {"gradient_as_bucket_view": True}
    module = "lightning_accel.strategy." + {"lightning": "trainer_unified", "pytorch_lightning": "trainer_standalone"}[root]
    assert facts["names"] == {name: [module, defaults | arguments] for name, arguments in NAMES.items()}
    assert facts["trainers"] == {name: value for name, value in facts["names"].items() if "qadam" in name} != {}
    assert set(facts["fabric"]) == set(NAMES)
    assert facts["variable"] == "bytegrad"


def test_switched_off_it_is_an_unknown_name(interpreters: Any) -> None:
    """Catches an autoload that works past torch's own switch; importing the package registers nevertheless, even late."""
    facts = interpreters["off"]
    for refusal in (facts["accel"], facts["variable"]):
        assert refusal.startswith("ValueError: You selected an invalid strategy name")
    assert facts["names"] == {}
    assert facts["fabric"] == []
    module, arguments = facts["after the import"]
    assert module == "lightning_accel.strategy.trainer_unified"
    assert arguments["algorithm"] == "bytegrad"


def test_each_root_has_its_own_class(interpreters: Any) -> None:
    """Catches `lightning_accel.AccelStrategy` of a root that the program does not use, which its Trainer refuses."""
    facts = interpreters["pytorch_lightning"]
    assert facts["class of the root in use"] == "lightning_accel.strategy.trainer_standalone"
    assert facts["class of Fabric's root in use"] == "lightning_accel.strategy.fabric_standalone"
    assert facts["instance"] == "lightning_accel.strategy.trainer_standalone"
    assert facts["another root, later"] == "lightning_accel.strategy.trainer_unified"
    assert AccelStrategy.__module__ == "lightning_accel.strategy.trainer_unified"


def test_the_autoload_knows_all_algorithms(interpreters: Any) -> None:
    """Catches an algorithm without a name of its own: the autoload must not import the package to ask."""
    known, registered = interpreters["lightning"]["algorithms"]
    assert sorted(known) == sorted(registered)


def test_registering_twice_is_harmless() -> None:
    """Catches Lightning's error about a name that is taken, and a second finder on sys.meta_path."""
    before, finders = dict(StrategyRegistry), list(sys.meta_path)
    lightning_accel_autoload.activate()
    AccelStrategy.register_strategies(StrategyRegistry)
    assert dict(StrategyRegistry) == before
    assert sys.meta_path == finders
    assert NAMES.keys() <= before.keys()


def test_a_broken_registry_breaks_neither_torch_nor_the_other_root(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches an exception out of the entry point: torch turns it into a failure of `import torch` itself."""

    class Broken(dict):
        def register(self, *args: Any, **kwargs: Any) -> None:
            raise RuntimeError("broken")

    class Registry(dict):
        def register(self, name: str, *args: Any, **kwargs: Any) -> None:
            self[name] = args

    working = Registry()
    for broken in (types.SimpleNamespace(StrategyRegistry=Broken()), types.SimpleNamespace(StrategyRegistry=object())):
        monkeypatch.setitem(sys.modules, "lightning.pytorch.strategies", broken)
        monkeypatch.setitem(sys.modules, "pytorch_lightning.strategies", types.SimpleNamespace(StrategyRegistry=working))
        lightning_accel_autoload.activate()
        assert NAMES.keys() <= working.keys()
        working.clear()


@pytest.mark.parametrize("frontend", [pl.Trainer, lightning.fabric.Fabric], ids=["trainer", "fabric"])
@pytest.mark.parametrize(
    ("chosen", "advised"),
    [
        ("accel_bytegrad", "'accel_bytegrad_notebook'"),
        ("accel_spawn_find_unused_parameters_true", "'accel_notebook_find_unused_parameters_true'"),
        (
            {"algorithm": "bytegrad", "codec": "int4", "start_method": "spawn"},
            "AccelStrategy(algorithm='bytegrad', codec='int4', start_method='fork')",
        ),
    ],
    ids=["name", "other", "object"],
)
def test_in_a_notebook_the_advice_keeps_the_algorithm(monkeypatch: Any, frontend: Any, chosen: Any, advised: str) -> None:
    """Catches Lightning's advice to use `ddp_notebook`, which trains without compression."""
    monkeypatch.setattr(sys, "ps1", ">>> ", raising=False)
    of_frontend = lightning_accel if frontend is pl.Trainer else lightning_accel.fabric

    def make(strategy: Any) -> Any:
        return frontend(strategy=strategy, accelerator="cpu", devices=2)

    with pytest.raises(ValueError, match=re.escape(f"{frontend.__name__}(strategy={advised})")):
        make(chosen if isinstance(chosen, str) else of_frontend.AccelStrategy(**chosen))
    assert make("accel_bytegrad_notebook").strategy.launcher.is_interactive_compatible


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Gives the strategy that LightningCLI makes of a command line."""

    def strategy_of(*arguments: str) -> Any:
        monkeypatch.setattr(sys, "argv", ["train.py"])
        given = ["--trainer.accelerator=cpu", "--trainer.devices=2", "--trainer.logger=false", *arguments]
        made = LightningCLI(Net, run=False, args=given, seed_everything_default=False, save_config_callback=None)
        return made.trainer.strategy

    return strategy_of


def test_cli_takes_the_string(cli: Any) -> None:
    """Catches names that LightningCLI cannot hand to the Trainer."""
    strategy = cli("--trainer.strategy", "accel_bytegrad")
    assert type(strategy) is AccelStrategy
    assert strategy.algorithm == lightning_accel.ByteGrad()


def test_cli_takes_the_class_path(cli: Any) -> None:
    """Catches a constructor that refuses the defaults of DDPStrategy and torch's DDP: LightningCLI gives each of them.

    Without an option beside it, Lightning itself takes `--trainer.strategy CLASS` for a name, DDPStrategy's own too.
    """
    strategy = cli("--trainer.strategy.class_path", "lightning_accel.AccelStrategy")
    assert type(strategy) is AccelStrategy
    assert strategy.algorithm == lightning_accel.GradientAllReduce()
    defaults = inspect.signature(DistributedDataParallel.__init__).parameters
    of_ddp = {name: defaults[name].default for name in strategy._ddp_kwargs}
    assert strategy._ddp_kwargs == of_ddp | {"gradient_as_bucket_view": True}


@pytest.mark.parametrize("codec", ["int8", "bf16"])
def test_cli_takes_options(cli: Any, codec: str) -> None:
    """Catches options that hide in `**kwargs`, and DDPStrategy's or DistributedDataParallel's that no longer pass."""
    strategy = cli(
        *("--trainer.strategy", "lightning_accel.AccelStrategy"),
        *("--trainer.strategy.algorithm", "bytegrad"),
        *("--trainer.strategy.codec", codec),
        *("--trainer.strategy.hierarchical", "auto"),
        *("--trainer.strategy.average", "false"),
        *("--trainer.strategy.bucket_cap_mb", "7"),
        *("--trainer.strategy.process_group_backend", "gloo"),
        *("--trainer.strategy.start_method", "spawn"),
    )
    assert strategy.algorithm == lightning_accel.ByteGrad(codec=codec, hierarchical="auto", average=False)
    assert strategy._ddp_kwargs["bucket_cap_mb"] == 7
    assert strategy.process_group_backend == "gloo"
    assert strategy._start_method == "spawn"


def test_cli_takes_options_of_weight_algorithms(cli: Any) -> None:
    """As above."""
    strategy = cli(
        *("--trainer.strategy", "lightning_accel.AccelStrategy"),
        *("--trainer.strategy.algorithm", "decentralized"),
        *("--trainer.strategy.peer_selection_mode", "shift_one"),
        *("--trainer.strategy.communication_interval", "3"),
    )
    assert strategy.algorithm == lightning_accel.Decentralized("shift_one", communication_interval=3)


@pytest.mark.parametrize(("option", "value"), [("bucket_cap", "7"), ("codec", "int9"), ("algorithm", "bytgrad")])
def test_cli_refuses_what_the_constructor_refuses(cli: Any, capsys: Any, option: str, value: str) -> None:
    """Catches a wrong option that LightningCLI swallows."""
    arguments = {"algorithm": "bytegrad", option: value}
    given = [word for name, word in arguments.items() for word in (f"--trainer.strategy.{name}", word)]
    with pytest.raises((SystemExit, ValueError)) as refused:
        cli("--trainer.strategy", "lightning_accel.AccelStrategy", *given)
    assert value in capsys.readouterr().err + str(refused.value)


def test_an_instance_is_of_its_roots_ddp() -> None:
    """Catches a strategy outside of Lightning's closed lists of classes, such as that of torch.compile."""
    assert isinstance(AccelStrategy(), pl.strategies.DDPStrategy)
