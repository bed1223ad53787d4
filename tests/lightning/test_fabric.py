"""Fabric(strategy="accel"): the same algorithms in a loop of one's own."""

import pytest

from helpers.ranks import run_script

EVERYTHING = """
import sys, threading
import torch
from {root} import Fabric

def own_threads():
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("lightning_accel")]

def make():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 1))

def train(strategy, use_closure=False, **options):
    fabric = Fabric(accelerator="cpu", devices=2, strategy=strategy, **options)
    fabric.launch()
    model = make()
    model, optimizer = fabric.setup(model, torch.optim.Adam(model.parameters(), lr=0.01))
    data = torch.Generator().manual_seed(fabric.global_rank)
    for step in range(6):
        batch = torch.randn(3, 4, generator=data)
        if use_closure:
            def closure():
                optimizer.zero_grad()
                loss = model(batch).square().sum()
                fabric.backward(loss)
                return loss
            assert optimizer.step(closure) is not None
            continue
        is_accumulating = step % 3 != 2
        with fabric.no_backward_sync(model, enabled=is_accumulating):
            fabric.backward(model(batch).square().sum())
        if not is_accumulating:
            optimizer.step()
            optimizer.zero_grad()
    return fabric, model, optimizer

def weights(model):
    return [parameter.detach().clone() for parameter in model.parameters()]

def assert_equal(mine, others):
    assert all(torch.equal(a, b) for a, b in zip(mine, others, strict=True))

for use_closure in (False, True):
    _, model, _ = train("ddp", use_closure)
    expected = weights(model)
    fabric, model, _ = train("accel", use_closure)
    assert type(fabric.strategy).__name__ == "AccelStrategy" and "lightning_accel" in sys.modules
    assert_equal(weights(model), expected)
    assert [replica.rounds for replica in fabric.strategy.replicas] == [6 if use_closure else 2]
    fabric.strategy.teardown()
    assert not own_threads() and fabric.strategy.replicas == []

from lightning_accel.strategy.{ours} import AccelStrategy
fabric, model, optimizer = train(AccelStrategy(algorithm="bytegrad", codec="int8"), precision="bf16-mixed")
assert isinstance(fabric.strategy, AccelStrategy)
statistics = fabric.strategy.replicas[0].statistics
assert 0 < statistics.sent_bytes < statistics.full_precision_bytes
everywhere = fabric.all_gather(torch.cat([weight.flatten() for weight in weights(model)]))
assert torch.equal(everywhere[0], everywhere[1])

state = {{"model": model, "optimizer": optimizer, "step": 6}}
path = sys.argv[1] + "/checkpoint"
fabric.save(path, state)
assert state.keys() == {{"model", "optimizer", "step"}}
before = weights(model)
with torch.no_grad():
    for parameter in model.parameters():
        parameter.zero_()
replica = fabric.strategy.replicas[0]
replica.load_state_dict({{**replica.state_dict(), "rounds": 0}})
state["step"] = 0
assert fabric.load(path, state) == {{}}
assert_equal(weights(model), before)
assert (state["step"], fabric.strategy.replicas[0].rounds) == (6, 2)

never = AccelStrategy(algorithm="async", sync_interval_ms=60_000)  # by itself: only its consensus is compared
for number, strategy in enumerate(("accel_decentralized", "accel_low_precision_decentralized", never)):
    drifting, model, optimizer = train(strategy)
    row = torch.cat([weight.flatten() for weight in weights(model)])
    everywhere = drifting.all_gather(row)
    assert not torch.equal(everywhere[0], everywhere[1])
    drifting.save(path, {{"model": model}})
    agreed = torch.cat([weight.flatten() for weight in weights(model)])
    assert torch.equal(agreed, ((everywhere[0].double() + everywhere[1].double()) / 2).float())
    raw = {{key: value + 1 for key, value in make().state_dict().items()}}
    raw_path = f"{{path}}-{{number}}-{{drifting.global_rank}}"
    torch.save(raw, raw_path)
    drifting.backward(model(torch.randn(3, 4)).square().sum())  # an exchange may be under way
    drifting.load_raw(raw_path, model)
    model(torch.ones(3, 4))  # a round begins
    optimizer.zero_grad()
    optimizer.step()
    for key, value in model.state_dict().items():
        assert torch.equal(value, raw[key]), key
    if drifting.global_rank == 0:
        drifting.load_raw(raw_path, make())  # none of ours: rank 0 waits for nobody
    drifting.strategy.teardown()

# Two modules: an optimizer's step ends the round of its own module alone.
first, first_optimizer = fabric.setup(make(), torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1))
second = make()
second, second_optimizer = fabric.setup(second, torch.optim.SGD(second.parameters(), lr=0.1))
_, of_first, of_second = fabric.strategy.replicas
batch = torch.ones(2, 4)
fabric.backward(first(batch).sum())
fabric.backward(second(batch).sum())
second_optimizer.step()
assert (of_first.rounds, of_second.rounds) == (0, 1)
fabric.strategy.teardown()
assert not own_threads()
print("all is well", flush=True)
"""


@pytest.mark.parametrize(
    ("root", "ours"),
    [("lightning.fabric", "fabric_unified"), ("lightning_fabric", "fabric_standalone")],
    ids=["one", "separate"],
)
def test_fabric_trains_accumulates_saves_and_loads(root, ours, tmp_path):
    """Catches a name that Fabric does not know, a round that ends with another module's optimizer, state that is not saved."""
    script = tmp_path / "script.py"
    script.write_text(EVERYTHING.format(root=root, ours=ours))
    said = run_script(script, 2, tmp_path, folder=tmp_path)
    assert [text.count("all is well") for text in said] == [1, 1]


@pytest.mark.parametrize("name", ["accel", "accel_bytegrad", "accel_spawn", "accel_find_unused_parameters_true"])
def test_names_are_registered(name):
    """Catches names that only the Trainer's registry has."""
    from lightning.fabric.strategies import STRATEGY_REGISTRY

    import lightning_accel.fabric

    strategy = STRATEGY_REGISTRY.get(name)
    assert type(strategy) is lightning_accel.fabric.AccelStrategy
    assert strategy._ddp_kwargs["gradient_as_bucket_view"]


def test_wrong_words_are_refused():
    """Catches options that are passed on in silence."""
    from lightning_accel.fabric import AccelStrategy

    with pytest.raises(TypeError, match="did you mean 'bucket_cap_mb'"):
        AccelStrategy(bucket_cap=3)
    with pytest.raises(ValueError, match="did you mean 'bytegrad'"):
        AccelStrategy(algorithm="bytegrda")
    with pytest.raises(TypeError, match=r"takes hierarchical, average: got .codec."):
        AccelStrategy(codec="int8")
