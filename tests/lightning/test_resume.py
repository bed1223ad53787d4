"""What each rank holds for itself, through Lightning's checkpoints: a resumed fit is the uninterrupted one, to the bit."""

import importlib
import logging
import os
import shutil
import signal
from pathlib import Path

import fsspec
import pytest
import torch
from lightning_fits import Ranks, points, weights

from helpers import drifting  # noqa: F401 - registers the algorithm
from helpers.ranks import run_ranks
from lightning_accel import Decentralized, LowPrecisionDecentralized

STEPS, EPOCHS, SAVED = 3, 4, 2


class Fits:
    """Fits on this rank with one of Lightning's roots: with dropout, a gradient scaler, and optimizers that drift apart."""

    def __init__(self, rank, world_size, folder, root="lightning.pytorch"):
        self.rank, self.world_size, self.folder = rank, world_size, Path(folder)
        pl = self.pl = importlib.import_module(root)
        fabric, name = ("lightning_fabric", "trainer_standalone") if "_" in root else ("lightning.fabric", "trainer_unified")
        self.strategy = importlib.import_module(f"lightning_accel.strategy.{name}").AccelStrategy
        environment = importlib.import_module(f"{fabric}.plugins.environments").ClusterEnvironment
        bases = (Ranks,) if issubclass(Ranks, environment) else (Ranks, environment)
        self.ranks = type("RanksOfRoot", bases, {})(rank, world_size)
        self.heard = []
        handler = logging.Handler()
        handler.emit = lambda record: self.heard.append(record.getMessage().partition(": ")[2])
        logging.getLogger("lightning_accel").addHandler(handler)

        class Net(pl.LightningModule):
            failing = dying = None

            def __init__(self):
                super().__init__()
                torch.manual_seed(7)
                self.net = torch.nn.Sequential(torch.nn.Linear(16, 9), torch.nn.Dropout(0.3), torch.nn.Linear(9, 4))
                torch.seed()

            def on_fit_start(self):
                if self.trainer.ckpt_path is None:
                    torch.manual_seed(rank)

            def training_step(self, batch, batch_idx):
                if self.failing == (self.current_epoch, batch_idx):
                    raise ArithmeticError("a bad batch")
                if self.dying == (self.current_epoch, batch_idx):
                    os.kill(os.getpid(), signal.SIGKILL)
                loss = torch.nn.functional.mse_loss(self.net(batch[0]), batch[1])
                # The scaler of rank 1 alone skips a step, and takes another scale.
                return loss * torch.inf if (self.global_rank, self.current_epoch, batch_idx) == (1, 0, 1) else loss

            def validation_step(self, batch, batch_idx):
                self.net(batch[0])

            def configure_optimizers(self):
                optimizer = torch.optim.Adam(self.parameters(), 0.01)
                return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.7)}

            def on_train_end(self):
                self.everything = self.trainer.strategy.everything(self)

        self.Net = Net

    def trainer(self, strategy="drifting", callbacks=(), plugins=(), **options):
        quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
        precision = self.pl.plugins.MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu", init_scale=2.0**10))
        trainer = self.pl.Trainer(
            strategy=strategy if strategy in ("ddp", "accel") else self.strategy(strategy),
            devices=self.world_size,
            plugins=[self.ranks, precision, *plugins],
            callbacks=list(callbacks),
            enable_checkpointing=bool(callbacks),
            **{"max_epochs": EPOCHS, **quiet, **options},
        )
        # Before the strategy ends what it holds.
        trainer.strategy.everything = lambda module: everything(module, trainer, precision.scaler)
        return trainer

    def saver(self, name="{epoch}", **options):
        """Saves each epoch; a save is a consensus, so that runs are equal only if they save alike."""
        return self.pl.callbacks.ModelCheckpoint(self.folder, name, **{"save_top_k": -1, **options})

    def fit(self, file=None, failing=None, dying=None, **options):
        module = self.Net()
        module.failing, module.dying = failing, dying
        trainer = self.trainer(**options)
        data, validation = points(STEPS, self.world_size), points(1, self.world_size)
        trainer.fit(module, data, validation, ckpt_path=None if file is None else str(self.folder / file))
        return module, trainer


def everything(module, trainer, scaler):
    """All that a fit depends on, as tensors by name."""
    replica = getattr(trainer.strategy, "_replica", None)
    found = {"weights": weights(module), "torch": torch.get_rng_state()}
    for place, state in trainer.optimizers[0].state_dict()["state"].items():
        found |= {f"optimizer {place} {name}": value.clone() for name, value in state.items()}
    found["scale"] = torch.tensor(list(scaler.state_dict().values()))
    if replica is not None:
        found["rounds"] = torch.tensor([replica.rounds, getattr(replica.algorithm, "steps", 0)])
        for place, residual in enumerate(replica.algorithm.rank_state_dict().get("residuals", ())):
            found[f"residual {place}"] = residual.clone()
    return found


def differ(one, other):
    """Names of what differs."""
    return {name.split()[0] for name in one.keys() | other.keys() if not torch.equal(one[name], other[name])}


def resume(rank, world_size, folder, root, algorithm):
    fits = Fits(rank, world_size, folder, root)
    whole, trainer = fits.fit(strategy=algorithm, callbacks=[fits.saver()])
    expected = whole.everything
    assert type(trainer.strategy).__bases__[1].__module__.startswith(root)
    resumed, _ = fits.fit(f"epoch={SAVED - 1}.ckpt", strategy=algorithm, callbacks=[fits.saver("resumed {epoch}")])
    seen = {"resumed differs": differ(resumed.everything, expected), "whole": expected}

    # Saved once fit is over.
    half, trainer = fits.fit(strategy=algorithm, max_epochs=SAVED)
    trainer.save_checkpoint(fits.folder / "half.ckpt")
    for file in fits.folder.glob(f"half.ckpt.ranks/*/rank-{rank}-of-2.pt"):
        for place, residual in enumerate(torch.load(file)["replicas"][0].get("residuals", ())):
            assert torch.equal(residual, half.everything[f"residual {place}"])
    assert fits.fit("half.ckpt", strategy=algorithm)[0].everything["rounds"][0] == STEPS * EPOCHS
    seen["heard"] = fits.heard
    return seen


@pytest.mark.parametrize("root", ["lightning.pytorch", "pytorch_lightning"])
def test_a_resumed_fit_is_the_uninterrupted_one_to_the_bit(tmp_path, root):
    """Catches rank 0's optimizer, scaler, generator or residual on every rank, and Lightning's restoring after ours."""
    pytest.importorskip(root)
    one, other = run_ranks(resume, 2, str(tmp_path), root, "drifting")
    for seen in (one, other):
        assert seen["resumed differs"] == set()
        assert seen["heard"] == []
    drifted = {"optimizer", "scale", "residual", "torch"}
    assert differ(one["whole"], other["whole"]) == drifted, "a test of equal ranks could not fail"
    (files,) = (tmp_path / f"epoch={SAVED - 1}.ckpt.ranks").iterdir()
    assert sorted(file.name for file in files.iterdir()) == ["rank-0-of-2.pt", "rank-1-of-2.pt"]
    assert files.name.startswith(f"step-{STEPS * SAVED}-")
    assert len(list(tmp_path.glob("half.ckpt.ranks/*/rank-*-of-2.pt"))) == 2
    own = [torch.load(file, weights_only=True)["entries"] for file in sorted(files.iterdir())]
    assert own[0].keys() == {"optimizer_states", "lr_schedulers", "MixedPrecision"}
    assert own[0]["MixedPrecision"]["scale"] != own[1]["MixedPrecision"]["scale"]


@pytest.mark.parametrize(
    "algorithm",
    [Decentralized("shift_one", communication_interval=2), LowPrecisionDecentralized(communication_interval=2)],
    ids=lambda algorithm: algorithm.name,
)
def test_weight_algorithms_go_on_with_the_same_bits(tmp_path, algorithm):
    """Catches an exchange at another round than before, replicas that do not follow from the file, and averaged momenta."""
    one, other = run_ranks(resume, 2, str(tmp_path), "lightning.pytorch", algorithm)
    for seen in (one, other):
        assert seen["resumed differs"] == set()
        assert seen["heard"] == []
    assert {"optimizer", "scale"} <= differ(one["whole"], other["whole"]), "a test of equal ranks could not fail"


def be_killed(rank, world_size, folder):
    fits = Fits(rank, world_size, folder)
    with pytest.raises(Exception, match=r"."):  # torch's words for a lost peer
        fits.fit(callbacks=[fits.saver()], dying=(SAVED, 1) if rank == 1 else None)


def go_on(rank, world_size, folder):
    fits = Fits(rank, world_size, folder)
    resumed, _ = fits.fit(f"epoch={SAVED - 1}.ckpt", callbacks=[fits.saver("resumed {epoch}")])
    whole, _ = fits.fit(callbacks=[fits.saver("whole {epoch}")])
    return differ(resumed.everything, whole.everything)


def test_a_killed_fit_goes_on_in_other_processes(tmp_path):
    """Catches what survives in a process, not in its files."""
    run_ranks(be_killed, 2, str(tmp_path), lost=[1])
    assert run_ranks(go_on, 2, str(tmp_path)) == [set()] * 2


def fail_alone(rank, world_size, folder):
    fits = Fits(rank, world_size, folder)
    on_exception = fits.pl.callbacks.OnExceptionCheckpoint(fits.folder, "failed")
    with pytest.raises(ArithmeticError if rank == 0 else Exception):  # the other one loses its peer, when this one ends
        fits.fit(callbacks=[on_exception], failing=(1, 2) if rank == 0 else None)
    return torch.load(fits.folder / "failed.ckpt", weights_only=True)["lightning_accel"]


def test_a_rank_that_fails_alone_saves_alone(tmp_path):
    """Catches a save that waits, while an exception is handled, for ranks that have none."""
    saved, _ = run_ranks(fail_alone, 2, str(tmp_path), lost=[1])
    assert (saved["generators"], saved["rank_files"]) == (None, None)


def keep_house(rank, world_size, folder):
    fits = Fits(rank, world_size, folder)
    callbacks = fits.pl.callbacks

    def listed():
        torch.distributed.barrier()
        names = sorted(path.name for path in fits.folder.iterdir())
        torch.distributed.barrier()
        return names

    # What ModelCheckpoint removes takes its files along; its link to the last one is resumed.
    fits.fit(callbacks=[fits.saver(save_top_k=1, save_last="link")], max_epochs=SAVED)
    newest = f"epoch={SAVED - 1}.ckpt"
    seen = {"kept": listed()}
    module, _ = fits.fit("last.ckpt")
    assert module.everything["rounds"][0] == STEPS * EPOCHS

    # Weights alone are nothing to go on from.
    fits.fit(callbacks=[fits.saver("light", save_weights_only=True)], max_epochs=1)
    seen["with weights alone"] = listed()

    # One of a failed save is found and named, where it is needed.
    torch.distributed.barrier()
    if rank == 0:
        shutil.copy(fits.folder / newest, fits.folder / "alone.ckpt")
    torch.distributed.barrier()
    module = fits.Net()
    fits.trainer().validate(module, points(1, world_size), ckpt_path=str(fits.folder / "alone.ckpt"), verbose=False)
    with pytest.raises(FileNotFoundError, match=r"rank 0 could not read .*alone.ckpt.ranks.*rank-0-of-2.pt is missing"):
        fits.fit("alone.ckpt")

    # Plain DDP reads it, and what plain DDP writes is read.
    ddp, _ = fits.fit(newest, strategy="ddp")
    assert ddp.everything.keys() & {"rounds"} == set()
    fits.fit(strategy="ddp", callbacks=[fits.saver("ddp")], max_epochs=1)
    assert fits.fit("ddp.ckpt")[0].everything["rounds"][0] == STEPS * (EPOCHS - 1)
    assert fits.heard == []

    # A rank that fails saves alone, and nobody waits for it.
    on_exception = callbacks.OnExceptionCheckpoint(fits.folder, "failed")
    with pytest.raises(ArithmeticError):
        fits.fit(callbacks=[on_exception], failing=(1, 2))
    fits.fit("failed.ckpt")
    (seen["heard"],) = fits.heard or [None]

    # A writer that takes its time is right where the checkpoint is all there is.
    later = fits.pl.plugins.io.AsyncCheckpointIO()
    fits.fit(strategy="accel", plugins=[later], callbacks=[fits.saver("later", save_top_k=1)], max_epochs=SAVED)
    assert fits.fit("later.ckpt", strategy="accel")[0].everything["rounds"][0] == STEPS * EPOCHS

    # Where no file system is shared, all is in the checkpoint, in rank 0's memory here.
    for strategy in ("drifting", "accel"):
        _, trainer = fits.fit(max_epochs=1, strategy=strategy)
        trainer.save_checkpoint("memory://far.ckpt")
        memory = fsspec.filesystem("memory")
        assert memory.find("/") == (["/far.ckpt"] if rank == 0 else [])
        trainer.strategy.remove_checkpoint("memory://far.ckpt")
        assert memory.find("/") == []

    # No room for the checkpoint.
    _, trainer = fits.fit(max_epochs=1)
    (fits.folder / "taken").touch()
    with pytest.raises(RuntimeError, match=r"rank . could not write .*taken/a.ckpt"):
        trainer.save_checkpoint(fits.folder / "taken" / "a.ckpt")
    return seen


def test_files_come_and_go_with_checkpoints(tmp_path):
    """Catches files that outlive a checkpoint, a hang where one rank saves alone, and places that cannot work in silence."""
    one, other = run_ranks(keep_house, 2, str(tmp_path))
    newest = f"epoch={SAVED - 1}.ckpt"
    assert one["kept"] == other["kept"] == [newest, f"{newest}.ranks", "last.ckpt"]
    assert one["with weights alone"] == sorted([*one["kept"], "light.ckpt"])
    assert one["heard"].startswith("the checkpoint was written by rank 0 alone")
    assert other["heard"] is None


def resume_fabric(rank, world_size, folder, root):
    fits = Fits(rank, world_size, folder, "pytorch_lightning" if root == "lightning_fabric" else "lightning.pytorch")
    name = "fabric_standalone" if root == "lightning_fabric" else "fabric_unified"
    strategy = importlib.import_module(f"lightning_accel.strategy.{name}").AccelStrategy
    path = str(Path(folder, "last.ckpt"))

    def start():
        fabric = importlib.import_module(root).Fabric(
            accelerator="cpu", devices=world_size, strategy=strategy("drifting"), plugins=[fits.ranks]
        )
        fabric.launch()
        torch.seed()
        model = torch.nn.Sequential(torch.nn.Linear(16, 9), torch.nn.Dropout(0.3), torch.nn.Linear(9, 4))
        model, optimizer = fabric.setup(model, torch.optim.Adam(model.parameters(), 0.01))
        scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
        return fabric, {"model": model, "optimizer": optimizer, "scheduler": scheduler, "step": 0}

    def train(fabric, state):
        for _ in range(3):
            state["step"] += 1
            batch = torch.randn(2, 16, generator=torch.Generator().manual_seed(state["step"])) + rank
            state["optimizer"].zero_grad()
            fabric.backward(state["model"](batch).square().mean())
            state["optimizer"].step()
            state["scheduler"].step(float(rank))

    def seen(fabric, state):
        (replica,) = fabric.strategy.replicas
        found = {"weights": weights(state["model"]), "residual": torch.cat([r.flatten() for r in replica.algorithm.residuals])}
        found |= {
            "torch": torch.get_rng_state(),
            "counters": torch.tensor([replica.rounds, replica.algorithm.steps, state["step"]]),
        }
        found["scheduler"] = torch.tensor(state["scheduler"].best)
        for place, moments in state["optimizer"].state_dict()["state"].items():
            found |= {f"optimizer {place} {name}": value.clone() for name, value in moments.items()}
        return found

    fabric, state = start()
    train(fabric, state)
    fabric.save(path, state)
    train(fabric, state)
    expected = seen(fabric, state)
    fabric.strategy.teardown()

    fabric, state = start()
    train(fabric, state)
    assert fabric.load(path, state) == {}
    train(fabric, state)
    differing = differ(seen(fabric, state), expected)

    torch.distributed.barrier()
    if rank == 0:
        shutil.rmtree(f"{path}.ranks")
    torch.distributed.barrier()
    before = seen(fabric, state)
    with pytest.raises(FileNotFoundError, match=r"rank-0-of-2.pt is missing"):
        fabric.load(path, state)
    assert not differ(seen(fabric, state), before)
    assert fabric.load(path)["step"] == 3
    fabric.strategy.teardown()
    return differing, expected


@pytest.mark.parametrize("root", ["lightning.fabric", "lightning_fabric"])
def test_fabrics_loop_goes_on_to_the_bit(tmp_path, root):
    """Catches rank 0's optimizer or scheduler on every rank, and a load that fails half-way."""
    pytest.importorskip(root)
    (one, mine), (other, theirs) = run_ranks(resume_fabric, 2, str(tmp_path), root)
    assert one == other == set()
    assert differ(mine, theirs) == {"weights", "optimizer", "scheduler", "residual", "torch"}
