"""Scripts as users write them, with the processes that Lightning starts; and what is left when one of them is killed."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning_fits import as_if_installed

from helpers import programs

SCRIPT = """
import os, signal, sys
from pathlib import Path
import torch
import {root} as pl

FOLDER, LOST = Path("."), {lost}


class Model(pl.LightningModule):
    def __init__(self, name, lost=None):
        super().__init__()
        self.name, self.lost = name, lost
        torch.manual_seed(3)
        self.net = torch.nn.Sequential(torch.nn.Linear(8, 20), torch.nn.Tanh(), torch.nn.Linear(20, 1))

    def training_step(self, batch, batch_idx):
        if batch_idx == 3 and self.global_rank == self.lost:
            (FOLDER / "dying").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return self.net(batch).square().mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)

    def on_train_start(self):
        (FOLDER / ("pid" + str(self.global_rank))).write_text(str(os.getpid()))

    def on_train_end(self):
        save(self, self.trainer, str(self.global_rank))


def save(model, trainer, who):
    weights = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
    sent = trainer.strategy.statistics.sent_bytes
    torch.save((weights, trainer.world_size, type(trainer.strategy).__module__, sent), FOLDER / (model.name + who))


def fit(name, lost=None):
    model = Model(name, lost)
    trainer = pl.Trainer(
        strategy=name, accelerator="cpu", devices=2, max_epochs=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )
    data = torch.randn(40, 8, generator=torch.Generator().manual_seed(4))
    trainer.fit(model, torch.utils.data.DataLoader(data, batch_size=2))
    save(model, trainer, "main" + os.environ.get("LOCAL_RANK", ""))


if __name__ == "__main__":
    for name in sys.argv[1:]:
        fit(name)
    if LOST is not None:
        fit(sys.argv[1], LOST)
"""

SCRIPTS = {
    "popen, rank 0 is lost": ("pytorch_lightning", 0, ["accel_bytegrad"]),
    "popen, rank 1 is lost": ("lightning.pytorch", 1, ["accel"]),
    "spawn and fork": ("lightning.pytorch", None, ["accel_bytegrad_spawn", "accel_fork"]),
}
"""Root, which rank kills itself in a second fit of the same processes, names of strategies. Nobody imports us."""


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """For each script its folder, how it ended, what it said, and seconds from a rank's death to the end of its processes."""
    outcomes: dict[str, dict[str, Any]] = {}
    for case, (root, lost, names) in SCRIPTS.items():
        folder = tmp_path_factory.mktemp("script")
        (folder / "train.py").write_text(SCRIPT.format(root=root, lost=lost))
        with (folder / "errors").open("w") as errors:
            process = subprocess.Popen(
                [sys.executable, "train.py", *names],
                env=as_if_installed(folder),
                cwd=folder,
                stdout=subprocess.DEVNULL,
                stderr=errors,
            )
        outcomes[case] = {"folder": folder, "process": process}
    deadline = time.monotonic() + 200
    try:
        while (running := [outcome for outcome in outcomes.values() if "errors" not in outcome]) and time.monotonic() < deadline:
            for outcome in running:
                if outcome["process"].poll() is not None and not _living(outcome["folder"]):
                    outcome["errors"] = (outcome["folder"] / "errors").read_text()
                    dying = outcome["folder"] / "dying"
                    outcome["seconds"] = time.time() - dying.stat().st_mtime if dying.exists() else None
            time.sleep(0.1)
    finally:
        for outcome in outcomes.values():
            outcome["process"].kill()
            outcome["process"].wait()
            for pid in _living(outcome["folder"]):
                os.kill(pid, signal.SIGKILL)
    assert not running, "scripts did not end"
    return outcomes


def _living(folder: Path) -> list[int]:
    """Those of a script's ranks that still run."""
    return [pid for path in folder.glob("pid*") if programs.is_alive(pid := int(path.read_text()))]


@pytest.mark.parametrize(
    ("case", "name"),
    [
        ("popen, rank 0 is lost", "accel_bytegrad"),
        ("popen, rank 1 is lost", "accel"),
        ("spawn and fork", "accel_bytegrad_spawn"),
        ("spawn and fork", "accel_fork"),
    ],
)
def test_a_name_is_enough_with_each_of_lightnings_launchers(outcomes: Any, case: str, name: str) -> None:
    """Catches names that a started process does not know, a strategy that cannot travel there, and ranks that train alone."""
    outcome = outcomes[case]
    assert (outcome["folder"] / f"{name}main").exists() or (outcome["folder"] / f"{name}main0").exists(), outcome["errors"]
    first, second = (torch.load(outcome["folder"] / f"{name}{rank}") for rank in (0, 1))
    assert torch.equal(first[0], second[0])
    name_of_root = "standalone" if SCRIPTS[case][0] == "pytorch_lightning" else "unified"
    assert first[1:3] == second[1:3] == (2, f"lightning_accel.strategy.trainer_{name_of_root}")
    (main,) = (torch.load(path) for path in outcome["folder"].glob(f"{name}main*") if not path.name.endswith("1"))
    assert torch.equal(main[0], first[0])
    assert main[3] == first[3] > 0, "the process that started the ranks does not know what they have sent"


def test_spawned_and_forked_processes_end_well(outcomes: Any) -> None:
    """Catches threads and groups that crash an interpreter on its way out."""
    outcome = outcomes["spawn and fork"]
    assert outcome["process"].returncode == 0, outcome["errors"]


@pytest.mark.parametrize("lost", [0, 1])
def test_a_killed_rank_ends_the_other_with_a_message(outcomes: Any, lost: int) -> None:
    """Catches a rank that waits for a dead one until a timeout, half an hour by default, or trains on alone; and processes
    left behind."""
    outcome = outcomes[f"popen, rank {lost} is lost"]
    assert outcome["process"].returncode != 0
    assert "CommunicationError: " in outcome["errors"]
    assert f"failed on rank {1 - lost} of 2" in outcome["errors"]
    assert "a rank that was killed" in outcome["errors"]
    assert outcome["seconds"] < 30
    assert len(list(outcome["folder"].glob("pid*"))) == 2
    assert not _living(outcome["folder"])
