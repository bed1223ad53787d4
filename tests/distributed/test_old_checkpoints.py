"""A checkpoint of a plain loop that an earlier version wrote: this version goes on with the bits that version went on with."""

from pathlib import Path

import pytest
import torch

from data import make_checkpoints
from helpers.ranks import run_ranks, run_script
from helpers.tensors import assert_same_tree, outline

DATA = Path(make_checkpoints.__file__).parent


def go_on(rank, world_size, folder, saved):
    make_checkpoints.train(Path(folder), Path(saved))


@pytest.fixture(scope="module", params=[1, 2], ids="version {}".format)
def old(request):
    """A folder of data."""
    return DATA / f"version-{request.param}" / "plain"


@pytest.fixture(scope="module")
def resumed(tmp_path_factory, old):
    """A folder with what was restored and what was trained on from there."""
    folder = tmp_path_factory.mktemp("resumed")
    run_ranks(go_on, make_checkpoints.WORLD_SIZE, str(folder), str(old / "last.pt"))
    return folder


def test_all_of_an_old_checkpoint_is_restored(resumed, old):
    """Catches an entry that has another name now: a residual, a counter or a generator that silently starts anew."""
    saved = make_checkpoints.contents(old / "last.pt")
    assert_same_tree(make_checkpoints.contents(resumed / "restored.pt"), saved)
    assert saved["checkpoint"]["optimizers"][0]["param_groups"][0]["frozen_step"] == make_checkpoints.WARMUP_STEPS
    for own in saved["ranks"]:
        assert all(residual.any() for kind in own["replicas"][0].values() for residual in kind[:1]), "nothing that could be lost"


def test_training_goes_on_from_an_old_checkpoint_with_the_same_bits(resumed, old):
    """Catches state that is restored and not used, or used otherwise than before."""
    expected = torch.load(old / "trained", weights_only=True)
    assert_same_tree(make_checkpoints.contents(resumed / "trained.pt"), expected)


def test_the_script_that_made_it_makes_one_of_the_same_format(tmp_path):
    """Catches a script that has rotted, and a format that changes without a checkpoint of the new one beside the old.

    The values may differ: torch's Adam, which is the warm-up, rounds as the machine does.
    """
    (tmp_path / "plain").mkdir()
    run_script(Path(make_checkpoints.__file__), make_checkpoints.WORLD_SIZE, tmp_path, "plain", folder=tmp_path)
    made, newest = (folder / "plain" / "last.pt" for folder in (tmp_path, DATA / "version-2"))
    for read in (torch.load, make_checkpoints.contents):
        assert_same_tree(outline(read(made)), outline(read(newest)))
