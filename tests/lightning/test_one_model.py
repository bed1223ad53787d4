"""One model, equal on all ranks, under Lightning: what is updated by hand, in validation, in files and at the end."""

import copy
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric import Fabric
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning_fits import CLASSES, Net, Ranks, points, trainer
from torch.optim.swa_utils import AveragedModel

from helpers.ranks import run_ranks
from helpers.tensors import assert_same_bits
from lightning_accel import AccelStrategy
from lightning_accel.fabric import AccelStrategy as FabricStrategy

TIMEOUT = timedelta(seconds=40)
OPTIONS = [
    {"algorithm": "decentralized", "peer_selection_mode": "all", "communication_interval": 2},
    {"algorithm": "low_precision_decentralized"},
    {"algorithm": "async", "sync_interval_ms": 5},
]
BACKBONE_BYTES = 4 * 400 * 300


class SelfDistilling(Net):
    """A student, a mean teacher, a centre that is not persistent, an average in the module, and a cache made in validation."""

    def __init__(self) -> None:
        super().__init__()
        self.teacher = copy.deepcopy(self.net).requires_grad_(False)
        self.average = AveragedModel(self.net).requires_grad_(False)
        self.backbone = torch.nn.Parameter(torch.zeros(400, 300), requires_grad=False)
        self.register_buffer("centre", torch.zeros(CLASSES), persistent=False)
        self.validated: list[dict[str, torch.Tensor]] = []
        self.own: list[torch.Tensor] = []

    def state(self) -> dict[str, torch.Tensor]:
        return {name: tensor.detach().clone() for name, tensor in (*self.named_parameters(), *self.named_buffers())}

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        with torch.no_grad():
            wanted = self.teacher(batch[0])
            self.centre.lerp_(wanted.mean(0), 0.5)
        return self.loss(batch) + torch.nn.functional.mse_loss(self.net(batch[0]), wanted - self.centre)

    def on_train_batch_end(self, *args: Any) -> None:
        for mine, own in zip(self.teacher.parameters(), self.net.parameters(), strict=True):
            mine.data.lerp_(own.data, 0.5)
        self.average.update_parameters(self.net)
        self.own.append(self.teacher[0].weight.detach().clone())

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        super().validation_step(batch, batch_idx)
        if not hasattr(self, "cache"):
            self.register_buffer("cache", torch.full((3,), float(self.global_rank)))  # in inference mode
        if batch_idx == 0:
            self.validated.append(self.state())


def _fits(rank: int, world_size: int, options: list[dict[str, Any]], folder: str) -> list[dict[str, Any]]:
    seen = []
    for number, chosen in enumerate(options):
        module = SelfDistilling()
        saving = ModelCheckpoint(Path(folder) / str(number), every_n_train_steps=3, save_top_k=-1)
        fields = {"max_epochs": 2, "limit_val_batches": 1, "enable_checkpointing": True, "callbacks": [saving]}
        runner = trainer(AccelStrategy(timeout=TIMEOUT, **chosen), rank, world_size, **fields)
        runner.fit(module, points(4, world_size), points(1, world_size))
        saved = torch.load(saving.best_model_path, weights_only=True)["state_dict"]
        sent_bytes = runner.strategy.statistics.sent_bytes
        seen.append({"validated": module.validated, "own": module.own, "end": module.state(), "saved": saved, "sent": sent_bytes})
    return seen


@pytest.mark.parametrize("world_size", [2, 3])
def test_teachers_are_one_model_in_validation_in_files_and_at_the_end(tmp_path: Path, world_size: int) -> None:
    """Catches frozen weights and late buffers that are each rank's own, and a frozen backbone that is sent."""
    results = run_ranks(_fits, world_size, OPTIONS, str(tmp_path))
    for number, options in enumerate(OPTIONS):
        first, *others = (result[number] for result in results)
        assert len(first["validated"]) == 1 + 2  # the sanity check, two epochs
        assert "centre" in first["end"]
        assert first["sent"] < BACKBONE_BYTES
        for rank, other in enumerate(others, start=1):
            what = f"{options['algorithm']}, rank {rank}"
            assert any(not torch.equal(*pair) for pair in zip(first["own"], other["own"], strict=True)), f"{what}: no difference"
            states = [*zip(first["validated"], other["validated"], strict=True), (first["end"], other["end"])]
            states.append((first["saved"], other["saved"]))
            for place, (mine, theirs) in enumerate(states):
                assert mine.keys() == theirs.keys()
                for name, tensor in mine.items():
                    if not (name == "cache" and place == 0):  # made after the consensus
                        assert_same_bits(theirs[name], tensor, f"{what}, state {place}, {name}")


def _refused(rank: int, world_size: int) -> list[str]:
    messages = []

    def note(action: Any) -> None:
        with pytest.raises(ValueError, match="needs the same parameters and buffers on all ranks") as error:
            action()
        messages.append(str(error.value))

    for algorithm in ("bytegrad", "decentralized"):
        module = Net()
        module.register_buffer("cache", torch.zeros(3 + rank), persistent=False)
        runner = trainer(AccelStrategy(algorithm=algorithm, timeout=TIMEOUT), rank, world_size)
        note(lambda runner=runner, module=module: runner.fit(module, points(2, world_size)))
        ranks = Ranks(rank, world_size)
        fabric = Fabric(strategy=FabricStrategy(algorithm=algorithm), accelerator="cpu", devices=world_size, plugins=[ranks])
        fabric.launch()
        note(lambda fabric=fabric, module=module: fabric.setup_module(module))
        ranks.teardown()
    # A cache that grows on one rank, in the middle of training.
    module = Net()
    module.register_buffer("cache", torch.zeros(3))
    module.on_train_batch_end = lambda *_: setattr(module, "cache", torch.zeros(3 + rank))
    runner = trainer(AccelStrategy(algorithm="decentralized", timeout=TIMEOUT), rank, world_size)
    note(lambda: runner.fit(module, points(2, world_size), points(1, world_size)))
    return messages


def test_models_that_differ_are_refused_on_all_ranks() -> None:
    """Catches processes that end without a Python error, and an error on one rank only."""
    mine, others = run_ranks(_refused, 2)
    assert mine == others
    for message in mine:
        assert "buffer 'cache' is torch.float32 of shape (3,) on rank 0, torch.float32 of shape (4,) on rank 1" in message
