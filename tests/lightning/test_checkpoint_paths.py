"""Lightning's checkpoints where its callbacks and plugins put them: by a path of each rank, in the background, at a URL."""

import errno
import os
import shutil
import tempfile
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from lightning.fabric import Fabric
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io import AsyncCheckpointIO, TorchCheckpointIO
from lightning_fits import Net, Ranks, points, trainer, weights

import lightning_accel.fabric
from helpers.ranks import run_ranks
from helpers.shelf import beside, listed
from lightning_accel import AccelStrategy, QAdam

STEPS = 3


class Resumable(Net):
    """Logs a loss that no rank shares, as a user does who leaves `sync_dist` out, and uses an optimizer with a state."""

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.loss(batch))

    def test_step(self, batch, batch_idx):
        self.log("test_loss", self.loss(batch))

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 0.01)

    def on_train_end(self):
        self.replica = self.trainer.strategy._replica
        self.moments = torch.cat([state["exp_avg"].flatten() for state in self.trainer.optimizers[0].state.values()])


def name_by_metric(rank, world_size, folder):
    strategy, data, validation = "accel_decentralized", points(STEPS, world_size), points(1, world_size)

    def fit(epochs, file=None):
        saver = ModelCheckpoint(folder, "{epoch}-{val_loss:.4f}", monitor="val_loss", save_top_k=1)
        module = Resumable()
        runner = trainer(strategy, rank, world_size, max_epochs=epochs, enable_checkpointing=True, callbacks=[saver])
        runner.fit(module, data, validation, ckpt_path=file)
        return module, runner, saver

    module, runner, saver = fit(3)
    own_path = saver.best_model_path
    found = listed(folder)
    (checkpoint,) = Path(folder).glob("*.ckpt")
    steps = STEPS * (int(checkpoint.name[6]) + 1)
    assert found == beside(checkpoint.name, steps), "one checkpoint is kept, with its files, and no other"
    # The path that this rank knows may be one that nobody wrote.
    runner.test(module, validation, ckpt_path="best", verbose=False)
    resumed, _, _ = fit(4, own_path)
    assert resumed.replica.rounds == 4 * STEPS
    runner.strategy.remove_checkpoint(str(checkpoint))
    return Path(own_path).name, resumed.moments


def test_a_name_with_a_metric_is_rank_0s(tmp_path):
    """Catches a checkpoint that cannot be resumed, and ranks' files that no callback ever removes."""
    (name, moments), (other, others) = run_ranks(name_by_metric, 2, str(tmp_path))
    assert name != other, "a test of equal names could not fail"
    assert not torch.equal(moments, others)


def name_by_steps(rank, world_size, folder):
    torch.manual_seed(rank)
    inputs = torch.utils.data.TensorDataset(*(torch.randn(8 + 4 * rank, size) for size in (16, 4)))
    data = torch.utils.data.DataLoader(inputs, batch_size=2)
    options = {"default_root_dir": folder, "enable_checkpointing": True, "use_distributed_sampler": False}

    def fit(epochs, file=None):
        module = Resumable()
        runner = trainer(AccelStrategy("async", sync_interval_ms=5), rank, world_size, max_epochs=epochs, **options)
        runner.fit(module, data, ckpt_path=file)
        return module, runner.checkpoint_callback.best_model_path

    module, path = fit(2)
    assert module.trainer.global_step == 8 + 4 * rank
    resumed, _ = fit(3, path)
    assert resumed.trainer.global_step > 8
    return Path(path).name, listed(folder)


def test_a_name_with_a_number_of_steps_is_rank_0s(tmp_path):
    """Catches async with Lightning's own checkpoints, whose ranks finish different numbers of steps."""
    (name, found), (other, _) = run_ranks(name_by_steps, 2, str(tmp_path))
    assert (name, other) == ("epoch=1-step=8.ckpt", "epoch=1-step=12.ckpt")
    assert [Path(path).name for path in found[::3]] == ["epoch=1-step=8.ckpt", "epoch=2-step=12.ckpt"]


def save_again(rank, world_size, folder):
    """Saves twice to one path, where a move from the folder for temporary files is a copy, as between file systems."""
    path, kept, rename = Path(folder, "a.ckpt"), Path(folder, "kept.ckpt"), os.rename

    def on_one_file_system(source, target, **options):
        if Path(source).parent == Path(tempfile.gettempdir()):
            raise OSError(errno.EXDEV, "Invalid cross-device link")
        rename(source, target, **options)

    def again(save):
        save(path)
        dist.barrier()
        if rank == 0:
            kept.unlink(missing_ok=True)
            kept.hardlink_to(path)  # sees what is written into the old file
        before = path.read_bytes()
        dist.barrier()
        save(path)
        dist.barrier()
        assert kept.read_bytes() == before
        assert torch.load(path, weights_only=False)
        assert not kept.samefile(path)
        assert not list(Path(folder).glob(".*"))

    with mock.patch("os.rename", on_one_file_system):
        for plugins in ([], [TorchCheckpointIO()], [AsyncCheckpointIO()], [AsyncCheckpointIO(TorchCheckpointIO())]):
            runner = trainer("accel_bytegrad", rank, world_size, plugins=plugins)
            runner.fit(Resumable(), points(1, world_size))

            def save(path, runner=runner):
                runner.save_checkpoint(path)
                runner.strategy.checkpoint_io.teardown()  # waits for a thread

            again(save)
        strategy = lightning_accel.fabric.AccelStrategy("bytegrad")
        fabric = Fabric(accelerator="cpu", devices=world_size, strategy=strategy, plugins=Ranks(rank, world_size))
        fabric.launch()
        model = fabric.setup(torch.nn.Linear(2, 2))
        again(lambda path: fabric.save(path, {"model": model}))
        fabric.strategy.teardown()


def test_a_path_has_the_old_checkpoint_or_the_new_one(tmp_path):
    """Catches Lightning's way to write, which is a copy into the old file where TMPDIR is on another file system."""
    run_ranks(save_again, 2, str(tmp_path))


def save_elsewhere(rank, world_size, folder):
    data = points(STEPS, world_size)

    def fit(epochs=2, where=folder, file=None, plugins=(), saver=None, **options):
        saver = ModelCheckpoint(where, **(saver or {"save_top_k": 1}))
        module = Resumable()
        strategy = AccelStrategy("decentralized", **options)
        settings = {"enable_checkpointing": True, "callbacks": [saver], "plugins": list(plugins)}
        runner = trainer(strategy, rank, world_size, max_epochs=epochs, **settings)
        runner.fit(module, data, ckpt_path=file)
        return module, saver.best_model_path

    whole, _ = fit(4, f"shelf://{folder}/whole")

    # At a URL, with files.
    _, path = fit(where=f"shelf://{folder}/far")
    assert listed(Path(folder, "far")) == beside(f"epoch=1-step={2 * STEPS}.ckpt", 2 * STEPS)
    resumed, _ = fit(4, f"shelf://{folder}/far on", path)
    assert torch.equal(resumed.moments, whole.moments)

    # In the background, inside the checkpoint.
    _, path = fit(where=f"{folder}/later", plugins=[AsyncCheckpointIO()])
    assert listed(Path(folder, "later")) == [f"epoch=1-step={2 * STEPS}.ckpt"]
    resumed, _ = fit(4, f"{folder}/later on", path, plugins=[AsyncCheckpointIO()])
    assert torch.equal(resumed.moments, whole.moments)
    with pytest.raises(ValueError, match="which rank_files='beside' does not allow: use"):
        fit(plugins=[AsyncCheckpointIO()], rank_files="beside")

    # Without the ranks' files, if told so.
    _, path = fit(where=f"{folder}/near")
    dist.barrier()
    if rank == 0:
        shutil.rmtree(f"{path}.ranks")
    dist.barrier()
    with pytest.raises(FileNotFoundError, match=r"rank-0-of-2.pt is missing: .*restore_rank_state=False goes on with"):
        fit(4, f"{folder}/near on", path)
    resumed, _ = fit(4, f"{folder}/near on", path, restore_rank_state=False)
    assert resumed.replica.rounds == 4 * STEPS
    with pytest.raises(ValueError, match="rank_files must be one of 'auto', 'beside', 'inside': got 'nowhere'"):
        AccelStrategy(rank_files="nowhere")
    return weights(whole), whole.moments


def test_states_of_ranks_go_where_checkpoints_go(tmp_path):
    """Catches remote paths and AsyncCheckpointIO that are refused, or whose resumed fit is another."""
    (_, moments), (_, others) = run_ranks(save_elsewhere, 2, str(tmp_path))
    assert not torch.equal(moments, others), "a test of equal ranks could not fail"


def be_alone(rank, world_size, folder):
    for strategy in ("accel_decentralized", "accel_async", "accel_low_precision_decentralized"):
        for where, plugins in ((f"{folder}/{strategy}", []), (f"memory://{strategy}", [AsyncCheckpointIO()])):
            saver = ModelCheckpoint(where, "{epoch}", save_top_k=1)
            options = {"enable_checkpointing": True, "callbacks": [saver], "plugins": plugins}
            trainer(strategy, rank, world_size, max_epochs=2, **options).fit(Resumable(), points(1, 1))
            module = Resumable()
            trainer(strategy, rank, world_size, max_epochs=3).fit(module, points(1, 1), ckpt_path=f"{where}/epoch=1.ckpt")
            assert module.replica.rounds == 3
        assert listed(Path(folder, strategy)) == ["epoch=1.ckpt"]


def test_one_rank_has_one_file(tmp_path):
    """Catches a folder for ranks' files, and refusals for their sake, where there is one rank."""
    run_ranks(be_alone, 1, str(tmp_path))


class Compressed(Resumable):
    def configure_optimizers(self):
        return QAdam(self.parameters(), 0.01, warmup_steps=1)


def change_nodes(rank, world_size, folder):
    def fit(num_nodes, epochs, file=None):
        module = Compressed()
        runner = trainer(AccelStrategy("qadam", codec="int4"), rank, world_size, max_epochs=epochs, num_nodes=num_nodes)
        runner.fit(module, points(STEPS, world_size), ckpt_path=file)
        return module, runner

    for saved, resumed in ((2, 1), (1, 2)):
        _, runner = fit(saved, 1)
        file = str(Path(folder, f"{saved}.ckpt"))
        runner.save_checkpoint(file)
        module, _ = fit(resumed, 2, file)
        assert module.replica.rounds == 2 * STEPS


def test_a_fit_goes_on_on_other_nodes(tmp_path):
    """Catches an error about residuals once model and optimizers were restored."""
    run_ranks(change_nodes, 4, str(tmp_path))
