"""Checkpoints: resumed training equals training that was not interrupted, and files go to and from plain DDP."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning_fits import Net, points, trainer, weights

from helpers.ranks import run_ranks

STEPS, EPOCHS = 4, 4
STRATEGIES = ("ddp", "accel_gradient_allreduce", "accel_bytegrad")


class Resumable(Net):
    """With an optimizer and a scheduler whose state a resumed run needs."""

    rounds = None

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.Adam(self.parameters(), 0.01)
        return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.7)}

    def on_train_end(self) -> None:
        replica = getattr(self.trainer.strategy, "_replica", None)
        self.rounds = replica.rounds if replica is not None else None


def _runs(rank: int, world_size: int, folder: str) -> dict[str, Any]:
    data = points(STEPS, world_size)
    heard: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: heard.append(record.getMessage().partition(": ")[2])
    logging.getLogger("lightning_accel").addHandler(handler)

    def run(strategy: str, file: str | None = None, **kwargs: Any) -> tuple[torch.Tensor, int | None]:
        module = Resumable()
        saver = ModelCheckpoint(Path(folder) / strategy, "{epoch}", save_top_k=-1) if file is None else None
        callbacks = [saver] if saver is not None else []
        runner = trainer(
            strategy, rank, world_size, max_epochs=EPOCHS, enable_checkpointing=saver is not None, callbacks=callbacks
        )
        runner.fit(module, data, ckpt_path=file and _file(folder, file), **kwargs)
        return weights(module), module.rounds

    seen: dict[str, Any] = {strategy: run(strategy) for strategy in STRATEGIES}
    for strategy in STRATEGIES:
        for source in STRATEGIES:
            seen[f"{source} into {strategy}"] = run(strategy, source)
    seen["heard"] = heard
    seen["weights only"] = run("accel_bytegrad", "accel_bytegrad", weights_only=True)

    module, runner = Resumable(), trainer("accel_bytegrad", rank, world_size)
    runner.validate(module, data, ckpt_path=_file(folder, "accel_bytegrad"), verbose=False)
    runner.fit(module, data)
    seen["fit after validating a file"] = module.rounds
    return seen


def _file(folder: str, strategy: str) -> str:
    """Written after two of four epochs."""
    return str(Path(folder) / strategy / "epoch=1.ckpt")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tmp_path_factory.mktemp("checkpoints"))


@pytest.fixture(scope="module")
def runs(folder: str) -> list[dict[str, Any]]:
    return run_ranks(_runs, 2, folder)


@pytest.mark.parametrize("strategy", STRATEGIES[1:])
def test_resumed_at_an_epochs_end_is_uninterrupted_bit_for_bit(runs: Any, strategy: str) -> None:
    """Catches state that the file lacks, or that is applied to a replica that setup replaces afterwards."""
    for seen in runs:
        whole, rounds = seen[strategy]
        resumed, resumed_rounds = seen[f"{strategy} into {strategy}"]
        assert torch.equal(resumed, whole)
        assert resumed_rounds == rounds == STEPS * EPOCHS
        assert not torch.equal(whole, weights(Resumable()))


def test_files_go_to_and_from_plain_ddp(runs: Any) -> None:
    """Catches files that need us to be read, and a strategy that cannot read files without its own state."""
    for seen in runs:
        whole, _ = seen["ddp"]
        assert torch.equal(seen["accel_gradient_allreduce into ddp"][0], whole)
        assert torch.equal(seen["ddp into accel_gradient_allreduce"][0], whole)
        assert seen["ddp into accel_gradient_allreduce"][1] == STEPS * EPOCHS // 2
        assert torch.equal(seen["accel_bytegrad into ddp"][0], seen["accel_bytegrad into accel_gradient_allreduce"][0])


def test_another_algorithms_state_is_not_taken_up(runs: Any) -> None:
    """Catches one algorithm's state in another, and silence about it."""
    for rank, seen in enumerate(runs):
        assert seen["accel_bytegrad into accel_gradient_allreduce"][1] == STEPS * EPOCHS // 2
        told = {
            "the checkpoint is of algorithm 'gradient_allreduce', this run uses 'bytegrad': its state starts anew",
            "the checkpoint is of algorithm 'bytegrad', this run uses 'gradient_allreduce': its state starts anew",
        }
        assert set(seen["heard"]) == (told if rank == 0 else set())


@pytest.mark.parametrize("strategy", STRATEGIES[1:])
def test_a_file_holds_plain_data(runs: Any, folder: str, strategy: str) -> None:
    """Catches classes of ours in the file: torch.load refuses them by default."""
    checkpoint = torch.load(_file(folder, strategy), weights_only=True)
    ours = checkpoint["lightning_accel"]
    assert len(ours.pop("generators")) == 2
    assert ours == {
        "version": 2,
        "algorithm": strategy.removeprefix("accel_"),
        "world_size": 2,
        "replicas": [{"rounds": STEPS * EPOCHS // 2, "algorithm": {}}],
        "layouts": ["any nodes"],
        "rank_files": None,
        "ranks": None,
    }
    assert not Path(_file(folder, strategy) + ".ranks").exists()


def test_a_file_is_resumed_with_weights_only(runs: Any) -> None:
    """Catches classes of ours in the file, where Lightning itself is told to refuse them."""
    for seen in runs:
        assert torch.equal(seen["weights only"][0], seen["accel_bytegrad"][0])


def test_a_file_that_was_validated_does_not_reach_the_next_fit(runs: Any) -> None:
    """Catches a file's state that waits for the next replica, whichever run that belongs to."""
    for seen in runs:
        assert seen["fit after validating a file"] == STEPS
