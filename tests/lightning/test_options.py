"""An option is written once, in its algorithm's dataclass: strategies, command line and `wrap` take it from there."""

import dataclasses
import inspect
import pickle
import pydoc
import sys
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.strategies import DDPStrategy
from lightning_fits import Net

import lightning_accel as accel
import lightning_accel.fabric
from lightning_accel import Algorithm, BoundAlgorithm, Context, register_algorithm
from lightning_accel.algorithms import registry
from lightning_accel.algorithms.common.docstrings import parse_args
from lightning_accel.strategy.options import show_keywords
from lightning_accel.strategy.trainer import TrainerStrategy

STRATEGIES = [accel.AccelStrategy, lightning_accel.fabric.AccelStrategy]
REFUSED = {"ddp_comm_state", "ddp_comm_hook", "ddp_comm_wrapper", "model_averaging_period"}


@pytest.fixture(autouse=True)
def _algorithms_as_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "_registry", dict(registry._registry))


@dataclasses.dataclass(frozen=True)
class Patient(Algorithm):
    """Waits.

    Args:
        patience_rounds: number of rounds that it waits
            before it does nothing.
        codec: what it would send.
    """

    patience_rounds: int = 3
    codec: str = "none"

    def __post_init__(self) -> None:
        if self.patience_rounds < 0:
            raise ValueError(f"patience_rounds must be 0 or more: got {self.patience_rounds}")

    def bind(self, context: Context) -> BoundAlgorithm:
        return BoundAlgorithm(context)


@pytest.fixture
def patient() -> type[Patient]:
    """An algorithm of a user's own, registered after the strategies' classes were made."""
    return register_algorithm("patient")(Patient)


@pytest.mark.parametrize("strategy", STRATEGIES, ids=["trainer", "fabric"])
def test_strategies_take_and_show_a_new_option(strategy: Any, patient: type[Patient]) -> None:
    """Catches a list of options that somebody must edit by hand: here nothing but the algorithm names them."""
    made = strategy(patience_rounds=5, algorithm="patient", static_graph=True, timeout=timedelta(seconds=9))
    assert made.algorithm == Patient(patience_rounds=5)
    assert strategy("patient", patience_rounds=None).algorithm == Patient()
    assert pickle.loads(pickle.dumps(made)).algorithm == made.algorithm
    assert made._ddp_kwargs == {"static_graph": True, "gradient_as_bucket_view": True}
    assert made._timeout == timedelta(seconds=9)
    for shown in (inspect.signature(strategy), inspect.signature(strategy.__init__)):
        assert shown.parameters["patience_rounds"] == inspect.Parameter(
            "patience_rounds", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=int | None
        )
        assert shown.parameters["codec"].annotation == str | None
        assert all(p.kind == p.KEYWORD_ONLY for p in shown.parameters.values() if p.name not in ("self", "algorithm"))
    told = "For patient (default 3): number of rounds that it waits before it does nothing."
    assert parse_args(strategy.__doc__)["patience_rounds"] == told
    assert "patience_rounds: For patient (default 3): number of rounds" in pydoc.plain(pydoc.render_doc(strategy))


@pytest.mark.parametrize("strategy", STRATEGIES, ids=["trainer", "fabric"])
def test_every_keyword_is_described(strategy: Any) -> None:
    """Catches an option without type or description on the command line, and an argument that would replace the algorithm."""
    parameters = inspect.signature(strategy).parameters
    docs = parse_args(strategy.__doc__)
    assert [*parameters] == [*docs]
    assert all(docs.values())
    assert not REFUSED & parameters.keys()
    assert {"bucket_cap_mb", "find_unused_parameters", "checkpoint_io", "timeout"} <= parameters.keys()
    assert parameters["gradient_as_bucket_view"].default is True
    for algorithm in registry.algorithm_names():
        for field in dataclasses.fields(registry.make_algorithm(algorithm)):
            assert algorithm in docs[field.name]
            assert parameters[field.name].annotation is not Any


@pytest.mark.parametrize("strategy", STRATEGIES, ids=["trainer", "fabric"])
def test_the_nearest_word_comes_first(strategy: Any, patient: type[Patient]) -> None:
    """Catches a hint at the end of hundreds of characters, and one that does not know a new option."""
    told = r"\. Options of patient: patience_rounds, codec\. It also takes those of DDPStrategy, DistributedDataParallel, "
    with pytest.raises(TypeError, match=r"^AccelStrategy does not take 'zzz'" + told + "checkpoints$"):
        strategy("patient", zzz=1)
    with pytest.raises(TypeError, match=r"^AccelStrategy does not take 'patience_round'; did you mean 'patience_rounds'\?"):
        strategy(patience_round=1)
    with pytest.raises(TypeError, match=r"takes hierarchical, average: got 'patience_rounds', an option of patient$"):
        strategy(patience_rounds=1)
    with pytest.raises(ValueError, match="patience_rounds must be 0 or more: got -1"):
        strategy("patient", patience_rounds=-1)
    with pytest.raises(TypeError, match="positional"):
        strategy("patient", 3)


def _cli(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> Any:
    monkeypatch.setattr(sys, "argv", ["train.py"])
    # A process makes a class's parser once; here an algorithm has joined since.
    monkeypatch.setattr("jsonargparse._typehints._cached_class_parsers", {}, raising=False)
    given = ["--trainer.accelerator=cpu", "--trainer.devices=2", "--trainer.logger=false", *arguments]
    return LightningCLI(Net, run=False, args=given, seed_everything_default=False, save_config_callback=None)


def test_command_line_takes_and_describes_a_new_option(
    patient: type[Patient], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a signature that jsonargparse cannot read, and docs that stay behind in the algorithm's file."""
    made = _cli(
        monkeypatch,
        *("--trainer.strategy", "lightning_accel.AccelStrategy"),
        *("--trainer.strategy.algorithm", "patient"),
        *("--trainer.strategy.patience_rounds", "7"),
    )
    assert made.trainer.strategy.algorithm == Patient(patience_rounds=7)
    monkeypatch.setenv("COLUMNS", "400")
    with pytest.raises(SystemExit):
        _cli(monkeypatch, "--trainer.strategy.help", "lightning_accel.AccelStrategy")
    told = " ".join(capsys.readouterr().out.split())
    assert "For patient (default 3): number of rounds that it waits before it does nothing. (type: int | null" in told
    assert "--trainer.strategy.bucket_cap_mb" in told
    assert not [name for name in REFUSED if name in told]


def test_wrap_takes_a_new_option(patient: type[Patient]) -> None:
    """Catches an option that plain PyTorch does not get, or a word that neither DDP nor an algorithm takes."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        model = torch.nn.Linear(2, 1)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        with pytest.raises(
            TypeError, match=r"^wrap does not take 'bucket_cap'; did you mean 'bucket_cap_mb'\? Options of patient: "
        ):
            accel.wrap(model, optimizer, "patient", bucket_cap=5)
        with pytest.raises(ValueError, match="patience_rounds must be 0 or more: got -1"):
            accel.wrap(model, optimizer, "patient", patience_rounds=-1)
        with accel.wrap(model, optimizer, "patient", patience_rounds=2, bucket_cap_mb=5) as ddp:
            assert ddp.bucket_bytes_cap == 5 * 1024 * 1024
            assert ddp.gradient_as_bucket_view
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize(
    ("option", "taker"),
    [("bucket_cap_mb", "DistributedDataParallel"), ("timeout", "wrap|DDPStrategy"), ("checkpoint_io", "DDPStrategy")],
)
def test_an_option_needs_a_name_of_its_own(option: str, taker: str) -> None:
    """Catches an option that the base class, DDP or `wrap` would swallow."""
    cls = dataclasses.make_dataclass("Clashing", [(option, int, 1)], bases=(Patient,), frozen=True)
    words = f"option '{option}' of algorithm 'clashing' .* needs a name of its own: ({taker}) takes"
    with pytest.raises(ValueError, match=words):
        register_algorithm("clashing")(cls)
    assert "clashing" not in registry.algorithm_names()


def test_a_later_base_class_finds_the_clash(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a clash that nobody notices because the algorithm was registered before the strategy's class was made."""
    monkeypatch.setattr(registry, "_reserved", {})
    register_algorithm("early")(dataclasses.make_dataclass("Early", [("start_method", str, "")], bases=(Patient,), frozen=True))
    with pytest.raises(ValueError, match=r"option 'start_method' of algorithm 'early' .*: DDPStrategy takes an argument"):

        @show_keywords
        class Late(TrainerStrategy, DDPStrategy):
            pass

    assert registry._reserved == {}


def test_types_that_only_a_type_checker_knows_and_computed_defaults() -> None:
    """Catches a signature that fails for all algorithms because of one annotation."""
    fields = [("unheard_of", "Unheard", None), ("computed", list, dataclasses.field(default_factory=list))]
    register_algorithm("odd")(dataclasses.make_dataclass("Odd", fields, bases=(Patient,), frozen=True))
    shown = registry.algorithm_options()
    assert shown["unheard_of"].annotation == Any | None
    assert shown["computed"].doc == "For odd (default computed): "
    assert accel.AccelStrategy("odd", unheard_of=1).algorithm.unheard_of == 1


def test_docstrings_of_other_styles_are_read() -> None:
    """Catches entries that get lost in torch's indentation, types in parentheses, or a second paragraph."""
    told = parse_args("""Does it.

        Args:
            first (list of int): One
                  and more: indeed.

                  More of it.
            second: Two.

        Raises:
            third: Never.
    """)
    assert told == {"first": "One and more: indeed.", "second": "Two."}
    assert parse_args(None) == parse_args("Nothing.") == {}
