"""What the constructor takes and refuses, before there is a process, a rank or a device."""

import inspect
import pickle
from datetime import timedelta
from typing import Any

import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy

from lightning_accel import AccelStrategy, ByteGrad, GradientAllReduce
from lightning_accel.algorithms import algorithm_names

REFUSED: dict[str, tuple[dict[str, Any], type[Exception], list[str]]] = {
    "algorithm": ({"algorithm": "bytgrad"}, ValueError, ["gradient_allreduce", "bytegrad", "got 'bytgrad'", "mean 'bytegrad'"]),
    "no algorithm": ({"algorithm": None}, ValueError, ["gradient_allreduce", "bytegrad", "got None"]),
    "class of an algorithm": ({"algorithm": ByteGrad}, ValueError, ["gradient_allreduce", "bytegrad", "got <class"]),
    "codec": ({"algorithm": "bytegrad", "codec": "int88"}, ValueError, ["int8", "bf16", "got 'int88'", "mean 'int8'"]),
    "hierarchical": ({"hierarchical": "yes"}, ValueError, ["True", "False", '"auto"', "got 'yes'"]),
    "average": ({"average": "no"}, ValueError, ["True", "False", "got 'no'"]),
    "option of another algorithm": ({"codec": "int8"}, TypeError, ["'gradient_allreduce'", "hierarchical, average", "'codec'"]),
    "options beside an object": ({"algorithm": ByteGrad(), "codec": "bf16"}, TypeError, ["ByteGrad(...)", "codec"]),
    "misspelt option": ({"averag": False}, TypeError, ["hierarchical, average", "'averag'", "mean 'average'"]),
    "misspelt argument of DDP": ({"bucket_cap": 5}, TypeError, ["'bucket_cap'", "mean 'bucket_cap_mb'"]),
    "misspelt argument of DDPStrategy": ({"start_metod": "fork"}, TypeError, ["start_method", "mean 'start_method'"]),
    "hook": ({"ddp_comm_hook": print}, ValueError, ["ddp_comm_hook", "register_algorithm"]),
    "state": ({"ddp_comm_state": object()}, ValueError, ["ddp_comm_state", "algorithm"]),
    "wrapper": ({"ddp_comm_wrapper": print}, ValueError, ["ddp_comm_wrapper", "codec"]),
    "averaging": ({"model_averaging_period": 4}, ValueError, ["model_averaging_period", "algorithm"]),
    "model": ({"module": torch.nn.Linear(1, 1)}, TypeError, ["'module'"]),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_in_one_line(case: str) -> None:
    """Catches a typo that trains with defaults, or fails later, in every process, without the valid words."""
    arguments, error, words = REFUSED[case]
    with pytest.raises(error) as refused:
        AccelStrategy(**arguments)
    message = str(refused.value)
    assert "\n" not in message
    assert len(message) < 300
    assert [word for word in words if word not in message] == []


def test_all_of_ddp_strategys_arguments_are_named() -> None:
    """Catches an argument that only `**kwargs` takes: LightningCLI would not offer it."""
    own = inspect.signature(AccelStrategy.__init__).parameters
    ddp = inspect.signature(DDPStrategy.__init__).parameters
    refused = {"ddp_comm_state", "ddp_comm_hook", "ddp_comm_wrapper", "model_averaging_period"}
    assert ddp.keys() - own.keys() == refused | {"kwargs"}
    for name in ddp.keys() & own.keys():
        assert own[name].default == ddp[name].default
    AccelStrategy(**dict.fromkeys(refused))


def test_all_options_of_all_algorithms_are_named() -> None:
    """Catches an algorithm with an option that the constructor, and so LightningCLI, does not know."""
    own = inspect.signature(AccelStrategy.__init__).parameters
    for algorithm in (GradientAllReduce(), ByteGrad()):
        for option in vars(algorithm):
            assert own[option].default is None
            assert AccelStrategy(algorithm.name, **{option: getattr(algorithm, option)}).algorithm == algorithm
    assert {GradientAllReduce.name, ByteGrad.name} <= set(algorithm_names())


def test_it_travels_in_a_pickle() -> None:
    """Catches options, locks or handles that a spawned process does not get."""
    made = AccelStrategy("bytegrad", codec="bf16", timeout=timedelta(seconds=7), start_method="spawn", static_graph=True)
    copy = pickle.loads(pickle.dumps(made))
    assert type(copy) is AccelStrategy
    assert copy.algorithm == ByteGrad(codec="bf16")
    assert (copy._timeout, copy._start_method) == (timedelta(seconds=7), "spawn")
    assert copy._ddp_kwargs == {"static_graph": True, "gradient_as_bucket_view": True}
    assert copy.statistics == made.statistics


def test_apples_mps_is_refused() -> None:
    """Catches training that starts on a device without collectives: Lightning refuses it for names with "ddp" only."""
    strategy = AccelStrategy(parallel_devices=[torch.device("mps", 0)])
    with pytest.raises(ValueError, match=r"MPS.*accelerator='cpu'"):
        strategy._configure_launcher()


def test_it_tolerates_half_a_set_up() -> None:
    """Catches a teardown that raises where set-up failed before there was a model or a replica, and hides the first error."""
    strategy = AccelStrategy("bytegrad", parallel_devices=[torch.device("cpu")])
    strategy._close_replica()
    strategy._close_replica()
