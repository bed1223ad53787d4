"""Options of algorithms, and the registry of their names."""

import dataclasses
import pickle

import pytest

from lightning_accel import (
    Algorithm,
    AsyncAverage,
    ByteGrad,
    Decentralized,
    GradientAllReduce,
    LowPrecisionDecentralized,
    register_algorithm,
)
from lightning_accel.algorithms import algorithm_names, make_algorithm
from lightning_accel.algorithms.registry import _registry


@pytest.fixture(autouse=True)
def _registry_as_before():
    before = dict(_registry)
    yield
    _registry.clear()
    _registry.update(before)


def test_the_names_are_there():
    """Catches an algorithm whose module is not imported, so that its name is unknown."""
    assert {"gradient_allreduce", "bytegrad", "decentralized", "low_precision_decentralized", "async"} <= set(algorithm_names())


@pytest.mark.parametrize(
    "algorithm",
    [
        ByteGrad(codec="bf16", hierarchical=True, average=False),
        GradientAllReduce(average=False),
        Decentralized("shift_one", communication_interval=2),
        LowPrecisionDecentralized("bf16", hierarchical=False),
        AsyncAverage(sync_interval_ms=7, warmup_steps=3),
    ],
)
def test_options_travel_to_other_processes(algorithm):
    """Catches options that hold a rank, a device or a lambda: spawn pickles the strategy."""
    again = pickle.loads(pickle.dumps(algorithm))
    assert again == algorithm
    assert hash(again) == hash(algorithm)
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(algorithm, dataclasses.fields(algorithm)[0].name, True)


def test_made_by_name_or_as_it_is():
    """Catches options that are dropped on the way."""
    assert make_algorithm("bytegrad") == ByteGrad()
    assert make_algorithm("bytegrad", {"codec": "fp16", "average": False}) == ByteGrad(codec="fp16", average=False)
    assert make_algorithm("gradient_allreduce", {"hierarchical": "auto"}) == GradientAllReduce(hierarchical="auto")
    algorithm = ByteGrad()
    assert make_algorithm(algorithm) is algorithm


def test_an_unknown_name_gets_the_known_ones_and_the_nearest():
    """Catches a KeyError, and a message without a remedy."""
    with pytest.raises(ValueError, match=r"algorithm must be one of .*bytegrad.*: got 'bytgrad'; did you mean 'bytegrad'\?"):
        make_algorithm("bytgrad")
    with pytest.raises(ValueError, match=r"algorithm must be one of .*: got 'zzzz'$"):
        make_algorithm("zzzz")
    with pytest.raises(ValueError, match=r"algorithm must be one of .*: got 7"):
        make_algorithm(7)


def test_an_unknown_option_gets_the_valid_ones_and_the_nearest():
    """Catches an option that is accepted and ignored."""
    with pytest.raises(TypeError, match=r"'bytegrad' takes codec, .*average.*: got 'averages'; did you mean 'average'\?"):
        make_algorithm("bytegrad", {"averages": True})
    with pytest.raises(TypeError, match="'gradient_allreduce' takes hierarchical, average: got 'codec'"):
        make_algorithm("gradient_allreduce", {"codec": "int8"})


def test_options_beside_an_object_are_refused():
    """Catches options that silently lose against those inside the object."""
    with pytest.raises(TypeError, match=r"give options inside ByteGrad\(\.\.\.\), not beside it: got codec, average"):
        make_algorithm(ByteGrad(), {"codec": "int8", "average": True})


@pytest.mark.parametrize("cls", [ByteGrad, GradientAllReduce, Decentralized, LowPrecisionDecentralized])
def test_values_are_checked_when_made(cls):
    """Catches a bad value that surfaces on some rank in the first backward, with the others waiting."""
    with pytest.raises(ValueError, match='hierarchical must be True, False or "auto": got 2'):
        cls(hierarchical=2)


def test_codec_is_checked_when_made():
    """As above."""
    with pytest.raises(ValueError, match=r"codec must be one of .*: got 'int9'"):
        ByteGrad(codec="int9")
    with pytest.raises(ValueError, match=r"codec must be one of .*: got None"):
        make_algorithm("bytegrad", {"codec": None})
    with pytest.raises(ValueError, match=r"codec must be one of .*: got 'int9'"):
        LowPrecisionDecentralized(codec="int9")


@pytest.mark.parametrize("cls", [Decentralized, LowPrecisionDecentralized])
@pytest.mark.parametrize("interval", [0, -1, 1.0, True, "2"])
def test_communication_interval_is_checked_when_made(cls, interval):
    """Catches a division by zero in the first round, and True for 1."""
    with pytest.raises(ValueError, match=r"communication_interval must be a whole number of rounds, 1 or more: got "):
        cls(communication_interval=interval)


def test_peer_selection_mode_is_checked_when_made():
    """As above."""
    with pytest.raises(ValueError, match="peer_selection_mode must be one of all, shift_one: got 'ring'"):
        Decentralized("ring")


def test_async_is_checked_when_made():
    """As above; and an interval that never passes, or a warm-up whose end is counted in something else than rounds."""
    for value in (0, -1, 0.5, True, "500", None):
        with pytest.raises(ValueError, match="sync_interval_ms must be a positive number of milliseconds: got"):
            AsyncAverage(sync_interval_ms=value)
    for value in (-1, 0.5, False, None):
        with pytest.raises(ValueError, match="warmup_steps must be a number of rounds, 0 or more: got"):
            make_algorithm("async", {"warmup_steps": value})
    assert make_algorithm("async") == AsyncAverage(sync_interval_ms=500, warmup_steps=0)
    assert make_algorithm("async", {"sync_interval_ms": 1}) == AsyncAverage(sync_interval_ms=1)


def test_a_name_belongs_to_one_class():
    """Catches a user's algorithm that replaces another by accident; a module that is imported again may replace its own."""

    @register_algorithm("mine")
    @dataclasses.dataclass(frozen=True)
    class Mine(Algorithm):
        def bind(self, context):
            raise NotImplementedError

    assert Mine.name == "mine"
    assert make_algorithm("mine") == Mine()
    register_algorithm("mine")(Mine)
    with pytest.raises(ValueError, match=r"the name 'bytegrad' belongs to lightning_accel\.algorithms\.bytegrad\.ByteGrad"):
        register_algorithm("bytegrad")(Mine)
    assert make_algorithm("bytegrad") == ByteGrad()
    assert Mine.name == "mine"
    with pytest.raises(TypeError, match="'mine' takes no options: got 'codec'"):
        make_algorithm("mine", {"codec": "int8"})
