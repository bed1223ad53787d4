"""How ranks come together under Lightning, whose own way is replaced."""

import io
import logging
import os
import signal
import time
from datetime import timedelta
from typing import Any
from unittest import mock

import lightning.pytorch as pl
import pytest
import torch
from lightning.fabric import Fabric
from lightning_fits import Net, points, weights

import lightning_accel as accel
from helpers.programs import agent_store, torchrun_variables
from helpers.ranks import run_ranks
from lightning_accel.fabric import AccelStrategy as FabricStrategy
from lightning_accel.transport import long_waits


class Dies(pl.Callback):
    """Kills its rank in the third batch."""

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 2:
            os.kill(os.getpid(), signal.SIGKILL)


def train_with_trainer(*, dies: bool) -> torch.Tensor:
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    strategy = accel.AccelStrategy("bytegrad", timeout=timedelta(seconds=30))
    callbacks = [Dies()] if dies else []
    trainer = pl.Trainer(strategy=strategy, accelerator="cpu", devices=2, max_epochs=1, callbacks=callbacks, **quiet)
    module = Net()
    trainer.fit(module, points(5, 2))
    return weights(module)


def train_with_fabric(*, dies: bool) -> torch.Tensor:
    fabric = Fabric(strategy=FabricStrategy("bytegrad", timeout=timedelta(seconds=30)), accelerator="cpu", devices=2)
    fabric.launch()
    net = Net()
    try:
        module, optimizer = fabric.setup(net.net, torch.optim.SGD(net.net.parameters(), 0.1))
        for step, (inputs, targets) in enumerate(points(5, 2)):
            if dies and step == 2:
                os.kill(os.getpid(), signal.SIGKILL)
            fabric.backward(torch.nn.functional.mse_loss(module(inputs), targets))
            optimizer.step()
    finally:
        fabric.strategy.teardown()
    return weights(net)


def be_restarted(rank: int, world_size: int, train: Any, attempt: int, port: int, killed_rank: int) -> Any:
    long_waits.FIRST_SECONDS = 0.5
    lines = io.StringIO()
    logging.getLogger("lightning_accel").addHandler(logging.StreamHandler(lines))
    with mock.patch.dict(os.environ, torchrun_variables(rank, world_size, port, attempt)):
        if attempt == 1:
            time.sleep(rank)
            return train(dies=False), lines.getvalue(), port
        with pytest.raises((RuntimeError, SystemExit)):
            train(dies=rank == killed_rank)
    return None


@pytest.mark.parametrize(("train", "killed_rank"), [(train_with_trainer, 1), (train_with_trainer, 0), (train_with_fabric, 1)])
def test_ranks_that_torchrun_starts_again_find_each_other(train: Any, killed_rank: int) -> None:
    """Catches addresses of killed ranks in the store of torchrun's agent, and a wait for a late rank without a word."""
    with agent_store() as port:
        arguments = train, 0, port, killed_rank
        run_ranks(be_restarted, 2, *arguments, backend=None, lost={killed_rank}, timeout=60)
        one, other = run_ranks(be_restarted, 2, train, 1, port, killed_rank, backend=None, timeout=60)
    assert torch.equal(one[0], other[0])
    assert f"Waiting for 1 of 2 ranks at 127.0.0.1:{port}, on rank 0: rank 1 has not come" in one[1]
    assert other[1] == ""
