"""When the strategy calls an algorithm: an algorithm that writes down its hooks, beside what the model saw.

Catches, each in one of the tests: a moment that comes too early, too late, twice or not at all.
"""

import itertools
import time
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint
from lightning.pytorch.plugins import MixedPrecision
from lightning_fits import Net, points, trainer, weights

from helpers.ranks import own_threads, run_ranks
from lightning_accel import AccelStrategy, Algorithm, BoundAlgorithm, ByteGrad, GradientAllReduce, register_algorithm

EVENTS: list[str] = []

STEP = ["before_forward", "forward", "reduce", "before_step", "clip", "step"]
"""A batch that is a round of its own, under automatic optimisation."""


class _Recording(BoundAlgorithm):
    """Gradients are reduced as the named algorithm does it."""

    def __init__(self, context: Any, inner: Algorithm) -> None:
        super().__init__(context)
        self._inner = inner.bind(context)

    def reduce_gradients(self, bucket: Any, label: str) -> torch.futures.Future[torch.Tensor]:
        EVENTS.append("reduce")
        return self._inner.reduce_gradients(bucket, label)

    def before_forward(self) -> None:
        EVENTS.append("before_forward")

    def before_step(self) -> None:
        EVENTS.append("before_step")

    def consensus(self) -> None:
        EVENTS.append("consensus")

    def teardown(self) -> None:
        EVENTS.append("teardown")


def _register() -> None:
    """In the ranks only: the registry of the process that runs pytest stays as it is."""

    @register_algorithm("recording")
    @dataclass(frozen=True)
    class Recording(Algorithm):
        codec: str | None = None

        def bind(self, context: Any) -> BoundAlgorithm:
            return _Recording(context, ByteGrad(self.codec) if self.codec else GradientAllReduce())


class Witness(Net):
    """Writes down what happens to the model."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        EVENTS.append("forward")
        return super().training_step(batch, batch_idx)

    def configure_gradient_clipping(self, *args: Any, **kwargs: Any) -> None:
        EVENTS.append("clip")

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        EVENTS.append("validate")
        super().validation_step(batch, batch_idx)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        EVENTS.append("test")

    def predict_step(self, batch: Any, batch_idx: int) -> None:
        EVENTS.append("predict")

    def on_save_checkpoint(self, checkpoint: Any) -> None:
        EVENTS.append("save")

    def configure_optimizers(self) -> Any:
        return _witnessed(super().configure_optimizers(), "step")


def _witnessed(optimizer: torch.optim.Optimizer, name: str) -> torch.optim.Optimizer:
    optimizer.register_step_post_hook(lambda *_: EVENTS.append(name))
    return optimizer


class TwoOptimizers(Witness):
    """Manual optimisation: two optimizers, a backward for each, and one step every `every` batches."""

    def __init__(self, every: int) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.every = every

    def training_step(self, batch: Any, batch_idx: int) -> None:
        EVENTS.append("forward")
        first, second = self.optimizers()
        for optimizer in (first, second):
            self.manual_backward(self.loss(batch))
            if (batch_idx + 1) % self.every == 0:
                optimizer.step()
                optimizer.zero_grad()

    def configure_optimizers(self) -> Any:
        return [
            _witnessed(torch.optim.SGD(self.net[0].parameters(), 0.1), "step first"),
            _witnessed(torch.optim.SGD(self.net[2].parameters(), 0.1), "step second"),
        ]


class Overflowing(Witness):
    """The loss is infinite, or not a number, on rank 1 in one batch each."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        factor = {2: float("inf"), 4: float("nan")}.get(batch_idx, 1.0)
        return loss * factor if self.global_rank == 1 else loss

    def on_train_batch_end(self, *args: Any) -> None:
        super().on_train_batch_end(*args)
        self.scales = [*getattr(self, "scales", []), self.trainer.precision_plugin.scaler.get_scale()]


class Failing(Witness):
    """Raises in the third batch, on some ranks; with `in_backward` after gradients have begun to travel."""

    def __init__(self, exception: BaseException, ranks: tuple[int, ...], in_backward: bool = False) -> None:
        super().__init__()
        self.exception, self.ranks, self.in_backward = exception, ranks, in_backward

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = super().training_step(batch, batch_idx)
        if batch_idx == 2 and self.global_rank in self.ranks:
            if not self.in_backward:
                raise self.exception
            # The first layer's gradients come last, in a bucket of their own.
            self.net[0].weight.register_hook(self._raise)
        return loss

    def _raise(self, gradient: torch.Tensor) -> None:
        raise self.exception


def _taken() -> list[str]:
    events, EVENTS[:] = list(EVENTS), []
    return events


def _strategy(codec: str | None = None, **kwargs: Any) -> AccelStrategy:
    return AccelStrategy("recording", codec=codec, timeout=timedelta(seconds=40), **kwargs)


def _hook_calls(rank: int, world_size: int, folder: str) -> dict[str, Any]:
    _register()
    seen: dict[str, Any] = {}

    def record(name: str, module: Net, steps: int, codec: str | None = None, **kwargs: Any) -> Any:
        strategy = _strategy(codec)
        runner = trainer(strategy, rank, world_size, num_sanity_val_steps=0, **kwargs)
        rounds = []
        module.on_train_end = lambda: rounds.append(strategy._replica.rounds)
        data = points(steps, world_size)
        runner.fit(module, data, data if "limit_val_batches" in kwargs else None)
        seen[name] = (_taken(), rounds[0])
        return runner

    record("automatic", Witness(), 3)
    record("accumulation", Witness(), 8, accumulate_grad_batches=4, val_check_interval=2, limit_val_batches=1)
    record("accumulation with a rest", Witness(), 3, accumulate_grad_batches=2)
    record("two optimizers", TwoOptimizers(every=1), 2)
    record("manual accumulation", TwoOptimizers(every=2), 4)

    saver = ModelCheckpoint(folder, every_n_train_steps=2, save_top_k=-1)
    runner = record("saving", Witness(), 3, enable_checkpointing=True, callbacks=[saver])
    runner.save_checkpoint(Path(folder) / "after.ckpt")
    seen["after fit"] = _taken()
    seen["rounds saved"] = torch.load(Path(folder) / "after.ckpt")["lightning_accel"]["replicas"][0]["rounds"]
    for stage in (runner.validate, runner.test, runner.predict):
        stage(runner.lightning_module, points(1, world_size), **({} if stage == runner.predict else {"verbose": False}))
    seen["stages by themselves"] = _taken()

    for codec in (None, "int8"):
        module = Overflowing()
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8, growth_interval=1000)
        record(f"skipped {codec}", module, 6, codec, plugins=[MixedPrecision("16-mixed", "cpu", scaler=scaler)])
        seen[f"skipped {codec}"] += (module.scales, torch.stack(module.history))
    return seen


@pytest.fixture(scope="module")
def hook_calls(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_ranks(_hook_calls, 2, str(tmp_path_factory.mktemp("checkpoints")))


def test_automatic_optimisation(hook_calls: Any) -> None:
    """Catches before_step ahead of the backward, or after clipping; and an end of fit without consensus."""
    for seen in hook_calls:
        assert seen["automatic"] == (STEP * 3 + ["consensus", "teardown"], 3)


def test_accumulation_with_validation_between_micro_batches(hook_calls: Any) -> None:
    """Catches a round that a validation's forward begins or ends, and micro-batches that are counted or reduced as rounds."""
    validation = ["consensus", "validate"]
    half = ["forward", "forward"]
    this_round = ["before_forward", *half, *validation, *half, "reduce", "before_step", "clip", "step", *validation]
    for seen in hook_calls:
        assert seen["accumulation"] == (this_round * 2 + ["consensus", "teardown"], 2)


def test_accumulation_that_ends_early(hook_calls: Any) -> None:
    """Catches a last, shorter round that is left open at the end of an epoch."""
    last = STEP
    first = ["before_forward", "forward", *STEP[1:]]
    for seen in hook_calls:
        assert seen["accumulation with a rest"] == (first + last + ["consensus", "teardown"], 2)


def test_two_optimizers_are_one_round(hook_calls: Any) -> None:
    """Catches a second optimizer's step that ends a second round: decentralized averaging twice in a GAN's batch."""
    batch = ["before_forward", "forward", "reduce", "before_step", "step first", "reduce", "step second"]
    for seen in hook_calls:
        assert seen["two optimizers"] == (batch * 2 + ["consensus", "teardown"], 2)


def test_accumulation_by_hand_is_one_round(hook_calls: Any) -> None:
    """Catches a forward that ends the round before it although no optimizer has stepped yet."""
    batches = ["before_forward", "forward", "reduce", "reduce", "forward", "reduce", "before_step", "step first"]
    for seen in hook_calls:
        assert seen["manual accumulation"] == ([*batches, "reduce", "step second"] * 2 + ["consensus", "teardown"], 2)


def test_saving(hook_calls: Any) -> None:
    """Catches files of weights that differ between ranks, and a file saved after fit that has lost the count of rounds."""
    for seen in hook_calls:
        events, _ = seen["saving"]
        assert events == STEP * 2 + ["consensus", "save"] + STEP + ["consensus", "teardown"]
        assert seen["after fit"] == ["save"]
        assert seen["rounds saved"] == 3


def test_stages_without_training_call_no_hooks(hook_calls: Any) -> None:
    """Catches consensus on a replica that was closed, when a stage runs by itself."""
    for seen in hook_calls:
        assert seen["stages by themselves"] == ["validate", "test", "predict"]


@pytest.mark.parametrize("codec", [None, "int8"])
def test_a_step_that_the_scaler_skips_is_a_round_on_every_rank(hook_calls: Any, codec: str | None) -> None:
    """Catches Inf or NaN that a codec hides from the other rank's scaler, and hooks that depend on a step having happened."""
    skipped = STEP[:-1]
    for events, rounds, scales, history in (seen[f"skipped {codec}"] for seen in hook_calls):
        assert events == (STEP * 2 + skipped + STEP + skipped + STEP + ["consensus", "teardown"])
        assert rounds == 6
        assert scales == [256, 256, 128, 128, 64, 64]
        changed = [not torch.equal(before, after) for before, after in itertools.pairwise(history)]
        assert changed == [True, False, True, False, True]
        assert history.isfinite().all()
        assert torch.equal(history, hook_calls[0][f"skipped {codec}"][3])


def _failures(rank: int, world_size: int, folder: str) -> dict[str, Any]:
    _register()
    seen: dict[str, Any] = {}

    def fail(name: str, exception: BaseException, ranks: tuple[int, ...], codec: str | None, **kwargs: Any) -> None:
        strategy = _strategy(codec, bucket_cap_mb=1e-4)
        saver = OnExceptionCheckpoint(Path(folder) / name)
        runner = trainer(strategy, rank, world_size, enable_checkpointing=True, callbacks=[saver])
        module = Failing(exception, ranks, **kwargs)
        started = time.monotonic()
        try:
            runner.fit(module, points(4, world_size))
        except BaseException as error:
            caught = (type(error).__name__, str(error))
        else:
            caught = ("nothing", "")
        seconds = time.monotonic() - started
        left = own_threads()
        saved = Path(saver.ckpt_path).exists()
        events = _taken()
        # What the next fit needs: the default group, and groups of the same ranks again.
        again = Witness()
        trainer(_strategy(codec), rank, world_size).fit(again, points(3, world_size))
        seen[name] = {
            "caught": caught,
            "seconds": seconds,
            "left": left,
            "events": events,
            "saved": saved,
            "again": (_taken(), weights(again)),
        }

    for codec in (None, "int8"):
        fail(f"all ranks {codec}", ValueError("mine"), (0, 1), codec)
        fail(f"rank 0 {codec}", ValueError("mine"), (0,), codec)
        fail(f"rank 1 {codec}", ValueError("mine"), (1,), codec)
        fail(f"in backward {codec}", ValueError("mine"), (0,), codec, in_backward=True)
        fail(f"interrupt {codec}", KeyboardInterrupt(), (0, 1), codec)
    return seen


@pytest.fixture(scope="module")
def failures(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return run_ranks(_failures, 2, str(tmp_path_factory.mktemp("on_exception")))


def _collapsed(events: list[str]) -> list[str]:
    """One "reduce" for all buckets of a backward."""
    return [event for k, event in enumerate(events) if event != "reduce" or events[k - 1] != "reduce"]


@pytest.mark.parametrize("codec", [None, "int8"])
@pytest.mark.parametrize("case", ["all ranks", "rank 0", "rank 1", "in backward", "interrupt"])
def test_an_exception_ends_the_fit_on_all_ranks_and_the_next_fit_works(failures: Any, case: str, codec: str | None) -> None:
    """Catches collectives on the way out of an exception (consensus, a barrier when a callback saves), peers that wait for
    their timeout of 40 s, threads left behind, and groups that the next fit cannot make again."""
    failing = {"rank 0": (0,), "rank 1": (1,), "in backward": (0,)}.get(case, (0, 1))
    for rank, seen in enumerate(rank_failures[f"{case} {codec}"] for rank_failures in failures):
        third = ["before_forward", "forward", "reduce"]
        if rank in failing:
            assert seen["caught"] == (("SystemExit", "1") if case == "interrupt" else ("ValueError", "mine"))
            third = third if case == "in backward" else third[:-1]
        else:
            assert seen["caught"][0] == "CommunicationError"
            assert f"rank {rank} of 2" in seen["caught"][1]
        assert _collapsed(seen["events"]) == STEP * 2 + third + ["save", "teardown"]
        assert seen["seconds"] < 15
        assert seen["left"] == []
        assert seen["saved"] or rank != 0
        events, trained = seen["again"]
        assert events == STEP * 3 + ["consensus", "teardown"]
        assert torch.equal(trained, failures[0][f"all ranks {codec}"]["again"][1])
