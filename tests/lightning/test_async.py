"""Trainer(strategy="accel_async"): nobody waits for a slow rank, all stop together, and what is evaluated is one model."""

import signal
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import Callback, ModelCheckpoint, OnExceptionCheckpoint
from lightning_fits import Net, fit, points, trainer, weights

from helpers.ranks import own_threads, run_ranks
from lightning_accel import AccelStrategy, AsyncAverage
from lightning_accel.fabric import AccelStrategy as FabricStrategy

TIMEOUT = timedelta(seconds=40)


def _strategy(**options: Any) -> AccelStrategy:
    return AccelStrategy("async", timeout=TIMEOUT, **{"sync_interval_ms": 5, **options})


class BatchNormed(Net):
    def __init__(self) -> None:
        super().__init__()
        self.started: torch.Tensor | None = None
        self.was_in_lockstep: list[bool] = []
        self.net.append(torch.nn.BatchNorm1d(self.net[2].out_features))
        self.evaluated: list[torch.Tensor] = []

    def on_train_start(self) -> None:
        self.started = weights(self)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.was_in_lockstep.append(self.trainer.strategy._replica.algorithm.is_in_lockstep)
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        super().validation_step(batch, batch_idx)
        self.evaluated.append(torch.cat([tensor.flatten().double() for tensor in self.state_dict().values()]))


def _evaluated(rank: int, world_size: int, folder: str) -> dict[str, Any]:
    module = BatchNormed()
    savers = [ModelCheckpoint(folder, every_n_train_steps=5, save_top_k=-1), ModelCheckpoint(folder, save_top_k=-1)]
    data = points(12, world_size)
    strategy = _strategy(warmup_steps=1)
    runner = trainer(
        strategy,
        rank,
        world_size,
        accumulate_grad_batches=4,
        val_check_interval=2,
        limit_val_batches=1,
        enable_checkpointing=True,
        callbacks=savers,
        max_epochs=2,
    )
    runner.fit(module, data, data)
    resumed = BatchNormed()
    path = Path(folder) / "epoch=0-step=3.ckpt"
    trainer(_strategy(warmup_steps=1), rank, world_size, accumulate_grad_batches=4, max_epochs=2).fit(
        resumed, data, ckpt_path=path
    )
    return {
        "resumed": (resumed.started, resumed.was_in_lockstep),
        "in lockstep": module.was_in_lockstep,
        "at the end again": weights(resumed),
        "evaluated": module.evaluated,
        "end": weights(module),
        "history": module.history,
        "left": own_threads(),
        "sent": strategy.statistics.sent_bytes,
    }


def test_what_is_evaluated_and_saved_is_one_model(tmp_path: Path) -> None:
    """Catches validation on weights or BatchNorm statistics that differ between ranks, between micro-batches too."""
    one, other = run_ranks(_evaluated, 2, str(tmp_path))
    assert len(one["evaluated"]) == 1 + 2 * 6  # with the sanity check's
    for mine, theirs in zip(one["evaluated"], other["evaluated"], strict=True):
        assert torch.equal(mine, theirs)
    assert torch.equal(one["end"], other["end"])
    assert any(not torch.equal(mine, theirs) for mine, theirs in zip(one["history"], other["history"], strict=True))
    assert one["left"] == other["left"] == []
    assert one["sent"] > 0
    saved = torch.load(tmp_path / "epoch=1-step=5.ckpt", weights_only=True)
    assert saved["lightning_accel"]["algorithm"] == "async"
    assert saved["lightning_accel"]["replicas"] == [{"rounds": 5, "algorithm": {"rounds": 5}}]
    saved = torch.load(tmp_path / "epoch=0-step=3.ckpt", weights_only=True)
    names = [name for name, _ in BatchNormed().named_parameters()]
    for seen in (one, other):
        # Accumulated over four batches, the first round is the warm-up; a resumed run has it behind it.
        assert seen["in lockstep"] == [True] * 4 + [False] * 20
        started, was_in_lockstep = seen["resumed"]
        assert torch.equal(started, torch.cat([saved["state_dict"][name].flatten() for name in names]))
        assert len(was_in_lockstep) >= 12
        assert not any(was_in_lockstep)
        assert torch.equal(seen["at the end again"], one["at the end again"])


class Slow(Net):
    """Rank 1 trains no further than `until_batch` before rank 0 is at its end."""

    def __init__(self, folder: str, until_batch: int) -> None:
        super().__init__()
        self.done, self.until_batch = Path(folder) / "done", until_batch
        self.waited_from: int | None = None

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if self.global_rank == 1 and batch_idx == self.until_batch:
            self.waited_from = batch_idx
            deadline = time.monotonic() + 20
            while not self.done.exists():
                assert time.monotonic() < deadline, "rank 0 was made to wait for this one"
                time.sleep(0.01)
            time.sleep(1)
        return super().training_step(batch, batch_idx)

    def on_train_batch_end(self, *args: Any) -> None:
        super().on_train_batch_end(*args)
        if self.global_rank == 0 and args[-1] == 39:
            self.done.touch()


def _slow(rank: int, world_size: int, folder: str) -> Any:
    broadcasts = []
    original = torch.distributed.broadcast
    torch.distributed.broadcast = lambda *args, **options: broadcasts.append(1) or original(*args, **options)
    try:
        module = Slow(folder, until_batch=5)
        strategy = _strategy()
        fit(strategy, rank, world_size, module, steps=40)
    finally:
        torch.distributed.broadcast = original
    return weights(module), module.waited_from, len(broadcasts), own_threads()


def test_a_slow_rank_is_waited_for_at_the_end_only(tmp_path: Path) -> None:
    """Catches Lightning's broadcast of every batch, and ranks that do not both end when they come there at different times."""
    (end, _, broadcasts, left), (others_end, waited_from, _, others_left) = run_ranks(_slow, 2, str(tmp_path))
    assert waited_from == 5
    assert torch.equal(end, others_end)
    assert broadcasts < 40
    assert left == others_left == []


class Signalled(Net):
    """A rank gets a SIGTERM in its third batch; rank 1 is slower."""

    def __init__(self, ranks: tuple[int, ...], at_batch: int = 3) -> None:
        super().__init__()
        self.ranks, self.at_batch = ranks, at_batch

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if batch_idx == self.at_batch and self.global_rank in self.ranks:
            signal.raise_signal(signal.SIGTERM)
        time.sleep(0.02 if self.global_rank else 0.005)
        return super().training_step(batch, batch_idx)


class SignalledInBetween(Signalled):
    """A rank gets it, and has time to tell the others, when these have begun the next batch, if nothing holds them."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return Net.training_step(self, batch, batch_idx)

    def on_train_batch_end(self, *args: Any) -> None:
        super().on_train_batch_end(*args)
        if args[-1] == self.at_batch and self.global_rank in self.ranks:
            time.sleep(0.2)
            signal.raise_signal(signal.SIGTERM)
            time.sleep(0.2)


class OnSave(Callback):
    """Notes the weights that OnExceptionCheckpoint saves on this rank."""

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: Any) -> None:
        self.weights = torch.cat([tensor.flatten() for tensor in checkpoint["state_dict"].values()])


def _terminated(rank: int, world_size: int, folder: str) -> dict[str, Any]:
    seen = {}
    cases = {
        "rank 0": (Signalled((0,)), {}, {}),
        "rank 1": (Signalled((1,)), {}, {}),
        "both": (Signalled((0, 1)), {}, {}),
        "warm-up": (SignalledInBetween((1,)), {"warmup_steps": 1000}, {}),
        "in between": (SignalledInBetween((1,)), {}, {}),
        "validations": (Signalled((1,)), {}, {"val_check_interval": 4, "limit_val_batches": 1}),
        "last batch": (Signalled((1,), at_batch=7), {}, {"limit_train_batches": 8, "max_epochs": 10_000}),
    }
    for name, (module, options, arguments) in cases.items():
        saver, witness = OnExceptionCheckpoint(Path(folder) / name), OnSave()
        runner = trainer(
            _strategy(**options), rank, world_size, callbacks=[saver, witness], enable_checkpointing=True, **arguments
        )
        data = points(2000, world_size)
        before = signal.getsignal(signal.SIGTERM)
        try:
            runner.fit(module, data, data if "limit_val_batches" in arguments else None)
        except BaseException as error:
            caught = type(error).__name__
        else:
            caught = "nothing"
        owners = (runner.fit_loop.epoch_loop, "_broadcast_sigterm_tensor"), (runner._signal_connector, "_sigterm_notifier_fn")
        seen[name] = {
            "caught": caught,
            "received": runner.received_sigterm,
            "batches": len(module.history),
            "saved": witness.weights,
            "file": Path(saver.ckpt_path).exists(),
            "replaced": [name for owner, name in owners if name in vars(owner)],
            "handler": signal.getsignal(signal.SIGTERM) == before,
            "left": own_threads(),
        }
    # Nothing stays behind: the next fit ends as it should.
    seen["again"] = weights(fit(_strategy(), rank, world_size))
    return seen


@pytest.fixture(scope="module")
def terminated(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_ranks(_terminated, 2, str(tmp_path_factory.mktemp("sigterm")))


@pytest.mark.parametrize("case", ["rank 0", "rank 1", "both", "warm-up", "in between", "validations", "last batch"])
def test_a_sigterm_on_one_rank_saves_and_stops_all(terminated: Any, case: str) -> None:
    """Catches a signal that stops one rank alone, ranks that wait for each other in different places, files of different
    models, and Lightning's handler or loop left replaced."""
    one, other = (seen[case] for seen in terminated)
    for seen in (one, other):
        assert seen["caught"] == "SIGTERMException"
        assert seen["received"]
        assert seen["file"]
        assert seen["batches"] < 2000
        assert seen["replaced"] == []
        assert seen["handler"]
        assert seen["left"] == []
    assert torch.equal(one["saved"], other["saved"])
    assert max(one["batches"], other["batches"]) > 3
    if case == "warm-up":
        assert one["batches"] == other["batches"]
    assert torch.equal(terminated[0]["again"], terminated[1]["again"])


class Ahead(Net):
    """Rank 1 waits in its twentieth batch, in a collective that is not the algorithm's, when rank 0 is signalled in its sixth."""

    def __init__(self, collective: str, folder: str) -> None:
        super().__init__()
        self.collective = collective
        self.waits = Path(folder) / f"{collective} waits"

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        strategy = self.trainer.strategy
        if self.global_rank == 0 and batch_idx == 5:
            deadline = time.monotonic() + 20
            while not self.waits.exists() and time.monotonic() < deadline:
                time.sleep(0.01)
            time.sleep(0.2)
            signal.raise_signal(signal.SIGTERM)
            time.sleep(0.3)
        loss = super().training_step(batch, batch_idx)
        if batch_idx == 19:  # between forward and backward
            if self.global_rank == 1:
                self.waits.touch()
            if self.collective == "log":
                self.log("loss", loss, on_step=True, sync_dist=True)
            elif self.collective == "gather":
                self.all_gather(loss)
            elif self.collective == "broadcast":
                strategy.broadcast(1)
            elif self.collective == "barrier":
                strategy.barrier()
        return loss


def _ahead(rank: int, world_size: int, folder: str) -> dict[str, Any]:
    seen = {}
    for collective in ("callback", "log", "gather", "broadcast", "barrier"):
        module, witness = Ahead(collective, folder), OnSave()
        callbacks = [OnExceptionCheckpoint(Path(folder) / collective), witness]
        if collective == "callback":
            callbacks.append(ModelCheckpoint(folder, every_n_train_steps=20))
        strategy = AccelStrategy("async", sync_interval_ms=100, timeout=TIMEOUT)
        started = time.monotonic()
        try:
            fit(strategy, rank, world_size, module, steps=40, callbacks=callbacks, enable_checkpointing=True)
        except BaseException as error:
            caught = type(error).__name__
        else:
            caught = "nothing"
        in_time = time.monotonic() - started < TIMEOUT.total_seconds()
        seen[collective] = caught, in_time, len(module.history), witness.weights, own_threads()
    return seen


def test_a_sigterm_reaches_a_rank_that_waits_in_a_collective_of_its_own(tmp_path: Path) -> None:
    """Catches a rank that waits for one that has gone to a consensus, to stop there, until the timeout."""
    one, other = run_ranks(_ahead, 2, str(tmp_path))
    for collective, (caught, in_time, batches, saved, left) in one.items():
        others_caught, others_in_time, others_batches, others_saved, others_left = other[collective]
        assert (collective, caught, others_caught) == (collective, "SIGTERMException", "SIGTERMException")
        assert in_time
        assert others_in_time
        assert (batches, others_batches) == (6, 19)
        assert torch.equal(saved, others_saved)
        assert left == others_left == []


class Logged(Net):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        time.sleep(0.002)
        loss = super().training_step(batch, batch_idx)
        self.log("loss", loss, on_step=True, sync_dist=True)
        return loss


def _logged(rank: int, world_size: int) -> tuple[int, bool]:
    strategy = _strategy(sync_interval_ms=100)  # of many batches, and the fit takes several
    module, seen = Logged(), []
    module.on_train_end = lambda: seen.append(strategy._replica.algorithm.averagings)  # type: ignore[method-assign]
    fit(strategy, rank, world_size, module, steps=300)
    return seen[0], own_threads() == []


def test_ranks_average_though_they_wait_for_each_other_at_each_batch() -> None:
    """Catches collectives that put averaging off for ever, and weights that change between forward and backward."""
    for averagings, left_nothing in run_ranks(_logged, 2):
        assert averagings >= 2
        assert left_nothing


def _failing_end(rank: int, world_size: int) -> None:
    strategy, module = _strategy(), Net()

    def fail() -> None:
        raise ValueError("no state today")

    module.on_train_end = lambda: setattr(strategy._replica.algorithm, "state_dict", fail)  # type: ignore[method-assign]
    with pytest.raises(ValueError, match="no state today"):
        fit(strategy, rank, world_size, module)
    runner = module.trainer_of_fit
    owners = (runner.fit_loop.epoch_loop, "_broadcast_sigterm_tensor"), (runner._signal_connector, "_sigterm_notifier_fn")
    assert not [name for owner, name in owners if name in vars(owner)]
    assert own_threads() == []
    fit(_strategy(), rank, world_size)


def test_an_end_that_fails_leaves_nothing_behind() -> None:
    """Catches Lightning's loop and handler left replaced, and threads, where the algorithm's state cannot be taken."""
    run_ranks(_failing_end, 2)


class Failing(Net):
    def __init__(self, exception: BaseException, ranks: tuple[int, ...]) -> None:
        super().__init__()
        self.exception, self.ranks = exception, ranks

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if batch_idx == 30 and self.global_rank in self.ranks:
            raise self.exception
        time.sleep(0.003)
        return super().training_step(batch, batch_idx)


def _failures(rank: int, world_size: int) -> dict[str, Any]:
    seen = {}
    cases = {
        "rank 0": (ValueError("mine"), (0,)),
        "rank 1": (ValueError("mine"), (1,)),
        "interrupt": (KeyboardInterrupt(), (1,)),
    }
    for name, (exception, ranks) in cases.items():
        started = time.monotonic()
        try:
            fit(_strategy(), rank, world_size, Failing(exception, ranks), steps=3000)
        except BaseException as error:
            caught = type(error).__name__
        else:
            caught = "nothing"
        seen[name] = caught, time.monotonic() - started, own_threads()
        dist.barrier()
    with pytest.raises(ValueError, match="async does not go with find_unused_parameters=True"):
        fit(_strategy(find_unused_parameters=True), rank, world_size)
    seen["again"] = weights(fit(_strategy(), rank, world_size))
    return seen


@pytest.mark.parametrize("strategy", [AccelStrategy, FabricStrategy])
def test_wrong_options_are_refused_by_the_constructor(strategy: type) -> None:
    """Catches options that one of the strategies does not pass on, and those that reach an algorithm that has none such."""
    assert strategy("async", sync_interval_ms=7, warmup_steps=3).algorithm == AsyncAverage(7, 3)
    for options in ({"sync_interval_ms": 0}, {"sync_interval_ms": -5}, {"warmup_steps": -1}):
        with pytest.raises(ValueError, match=f"{next(iter(options))} must be a .*number"):
            strategy("async", **options)
    with pytest.raises(TypeError, match=r"'bytegrad' takes codec, .*: got 'warmup_steps'"):
        strategy("bytegrad", warmup_steps=3)


def test_exceptions_leave_no_thread_and_no_hang() -> None:
    """Catches a rank that trains on by itself after the other has failed, and an end that waits for one that is gone."""
    one, other = run_ranks(_failures, 2)
    for case, own, others in (
        ("rank 0", "ValueError", "CommunicationError"),
        ("rank 1", "CommunicationError", "ValueError"),
        ("interrupt", "CommunicationError", "SystemExit"),
    ):
        for (caught, seconds, left), expected in ((one[case], own), (other[case], others)):
            assert (case, caught) == (case, expected)
            assert seconds < 15
            assert left == []
    assert torch.equal(one["again"], other["again"])
