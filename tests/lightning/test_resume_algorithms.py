"""Every algorithm with a state of its own: a fit that is resumed from a checkpoint is the one that was not interrupted."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning_fits import Net, points, trainer, weights

from helpers.ranks import run_ranks
from lightning_accel import AccelStrategy, QAdam

EPOCHS, STEPS, SAVED = 4, 4, 2

ALGORITHMS: dict[str, tuple[int, dict[str, Any]]] = {
    "bytegrad, int8": (3, {"algorithm": "bytegrad"}),
    "bytegrad, int4": (3, {"algorithm": "bytegrad", "codec": "int4"}),
    "qadam in warm-up": (2, {"algorithm": "qadam", "codec": "sign"}),
    "qadam after warm-up": (2, {"algorithm": "qadam", "codec": "sign"}),
    "decentralized, all": (3, {"algorithm": "decentralized", "communication_interval": 3}),
    "decentralized, shift_one": (
        2,
        {"algorithm": "decentralized", "peer_selection_mode": "shift_one", "communication_interval": 3},
    ),
    "low_precision_decentralized": (3, {"algorithm": "low_precision_decentralized"}),
}
"""Numbers of ranks and keywords. From three ranks on, sums depend on the order of ranks; shift_one needs an even number."""


class Resumable(Net):
    def __init__(self, case: str) -> None:
        super().__init__()
        self.case = case

    def configure_optimizers(self) -> Any:
        if "qadam" in self.case:
            steps = STEPS * SAVED + (2 if "in warm-up" in self.case else -2)
            optimizer: Any = QAdam(self.parameters(), 0.01, warmup_steps=steps)
        else:
            optimizer = torch.optim.Adam(self.parameters(), 0.01)
        return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.7)}


def _resume(rank: int, world_size: int, folder: str, case: str) -> None:
    data = points(STEPS, world_size)

    def run(name: str, file: str | None = None) -> Net:
        saver = ModelCheckpoint(Path(folder) / name, "{epoch}", save_top_k=-1)  # a save is a consensus, and so a part of the fit
        runner = trainer(
            AccelStrategy(**ALGORITHMS[case][1]),
            rank,
            world_size,
            max_epochs=EPOCHS,
            enable_checkpointing=True,
            callbacks=[saver],
        )
        module = Resumable(case)
        runner.fit(module, data, ckpt_path=file)
        return module

    whole = run("whole")
    resumed = run("resumed", str(Path(folder) / "whole" / f"epoch={SAVED - 1}.ckpt"))
    # The weights that the fits end with, and those on the way there, which differ between ranks with some algorithms.
    assert len(resumed.history) == STEPS * (EPOCHS - SAVED)
    for step, (got, wanted) in enumerate(zip(resumed.history, whole.history[STEPS * SAVED :], strict=True)):
        assert torch.equal(got, wanted), f"{case}, step {step} after the resume"
    assert torch.equal(weights(resumed), weights(whole))


@pytest.mark.parametrize("case", ALGORITHMS)
def test_resumed_is_uninterrupted(case: str, tmp_path: Path) -> None:
    """Catches residuals, replicas, counters, phases and optimizers that start anew, or are another rank's."""
    run_ranks(_resume, ALGORITHMS[case][0], str(tmp_path), case)
