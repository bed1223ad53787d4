"""A Trainer's checkpoint that an earlier version wrote: this version goes on with the bits that version went on with."""

from pathlib import Path

import pytest
import torch
from lightning_fits import Ranks

from data import make_checkpoints
from helpers.ranks import run_ranks
from helpers.tensors import assert_same_tree, outline

DATA = Path(make_checkpoints.__file__).parent


def go_on(rank: int, world_size: int, folder: str, saved: str) -> None:
    make_checkpoints.fit(Path(folder), Path(saved), plugins=(Ranks(rank, world_size),))


@pytest.mark.parametrize("version", [1, 2])
def test_a_fit_goes_on_from_an_old_checkpoint_with_the_same_bits(tmp_path: Path, version: int) -> None:
    """Catches an entry that has another name now: residuals, momentum, counters or generators that silently start anew."""
    folder = DATA / f"version-{version}" / "lightning"
    for own in make_checkpoints.contents(folder / "last.ckpt")["ranks"]:
        assert all(residual.any() for kind in own["replicas"][0].values() for residual in kind[:1]), "nothing that could be lost"
    run_ranks(go_on, make_checkpoints.WORLD_SIZE, str(tmp_path), str(folder / "last.ckpt"))
    expected = torch.load(folder / "trained", weights_only=True)
    assert_same_tree(make_checkpoints.contents(tmp_path / "trained.ckpt"), expected)


def make(rank: int, world_size: int, folder: str) -> None:
    make_checkpoints.fit(Path(folder), plugins=(Ranks(rank, world_size),))


def test_a_fit_of_this_version_saves_what_the_earlier_one_saved(tmp_path: Path) -> None:
    """Catches a format that changes without a checkpoint of the new one beside the old, and training that changes at all."""
    run_ranks(make, make_checkpoints.WORLD_SIZE, str(tmp_path))
    made, old = tmp_path / "last.ckpt", DATA / "version-2" / "lightning" / "last.ckpt"
    assert_same_tree(make_checkpoints.contents(made), make_checkpoints.contents(old))
    for read in (lambda path: torch.load(path)[make_checkpoints.KEY], make_checkpoints.states_of_ranks):
        assert_same_tree(outline(read(made)), outline(read(old)))
