"""What each rank holds for itself, through a checkpoint of a plain PyTorch loop: to the bit, or not at all."""

import os
import resource
import shutil
import signal
from pathlib import Path

import pytest
import torch

import lightning_accel as accel
from helpers.ranks import run_ranks
from helpers.saved_runs import STEPS, Run, assert_same, differ, heard_by
from lightning_accel.checkpoint import files, save_load


def resume(rank, world_size, folder, algorithm):
    path = Path(folder, "last.pt")
    heard = heard_by()
    with Run(rank, algorithm) as whole:
        whole.train()
        whole.save(path, mine=rank)
        saved = whole.everything()
        listed = sorted(str(found.relative_to(folder)) for found in Path(folder).rglob("*"))
        whole.train()
        expected = whole.everything()
    with Run(rank, algorithm) as resumed:
        resumed.train(2)  # whatever there was before is replaced
        extra = resumed.load(path)
        assert_same(resumed.everything(), saved)
        resumed.train()
        assert_same(resumed.everything(), expected)
    assert heard == []
    return saved, listed, extra["mine"]


def test_a_resumed_run_is_the_uninterrupted_one_to_the_bit(tmp_path):
    """Catches rank 0's optimizer, residual or generator on all ranks, and a counter that starts at zero."""
    (one, listed, mine), (other, also, theirs) = run_ranks(resume, 2, str(tmp_path), "drifting")
    assert differ(one, other) == {"optimizer", "residual", "torch", "python"}, "a test of equal ranks could not fail"
    assert (mine, theirs) == (0, 1)
    assert listed == also
    _, _, step, *files = listed
    assert step.startswith(f"last.pt.ranks/step-{STEPS}-")
    assert listed == ["last.pt", "last.pt.ranks", step, f"{step}/rank-0-of-2.pt", f"{step}/rank-1-of-2.pt"]
    for rank, file in enumerate(files):
        saved = torch.load(tmp_path / file, weights_only=True)
        assert (saved["rank"], saved["world_size"], saved["rounds"]) == (rank, 2, [STEPS])
        assert saved["folder"] == Path(step).name


def test_where_ranks_hold_the_same_there_are_no_files(tmp_path):
    """Catches a folder beside every checkpoint, and one random state for all ranks."""
    (one, listed, mine), (other, _, theirs) = run_ranks(resume, 2, str(tmp_path), "gradient_allreduce")
    assert differ(one, other) == {"torch", "python"}
    assert listed == ["last.pt"]
    assert (mine, theirs) == (0, 0)


@pytest.mark.parametrize(("algorithm", "world_size"), [(accel.ByteGrad(codec="int4"), 3), ("qadam", 2)])
def test_residuals_go_on_to_the_bit(tmp_path, algorithm, world_size):
    """Catches residuals that start anew, and momenta that travel again as gradients."""
    ranks = run_ranks(resume, world_size, str(tmp_path), algorithm)
    saved, listed, _ = ranks[0]
    assert len(listed) == 3 + world_size
    assert any(value.any() for name, value in saved.items() if name.startswith("residual"))
    assert differ(saved, ranks[1][0]) == {"residual", "torch", "python"}


def save_once(rank, world_size, folder):
    with Run(rank) as run:
        run.train()
        run.save(Path(folder, "last.pt"))
        return run.everything()


def load_elsewhere(rank, world_size, folder):
    heard = heard_by()
    with Run(rank) as run:
        run.train(1)  # whatever there was before is replaced
        run.load(Path(folder, "last.pt"))
        found = run.everything()
        run.train(1)
    return found, heard


@pytest.mark.parametrize("world_size", [1, 3])
def test_at_another_world_size_all_ranks_start_from_the_model(tmp_path, world_size):
    """Catches another rank's residual taken up, silence about it, and ranks that do not start from one model."""
    rank_0, _ = run_ranks(save_once, 2, str(tmp_path))
    runs = run_ranks(load_elsewhere, world_size, str(tmp_path))
    for rank, (found, heard) in enumerate(runs):
        assert differ(found, rank_0) == {"residual", "torch", "python"}
        assert all(not value.any() for name, value in found.items() if name.startswith("residual"))
        assert len(heard) == (rank == 0)
    assert f"is of 2 ranks, this run has {world_size}" in runs[0][1][0]


def load_broken(rank, world_size, folder):
    path = Path(folder, "last.pt")
    with Run(rank) as run:
        run.train()
        run.save(path)
        (own,) = Path(f"{path}.ranks").iterdir()
        first, second = own / "rank-0-of-2.pt", own / "rank-1-of-2.pt"
        kept = second.read_bytes()
        run.train(1)
        run.save(Path(folder, "other.pt"))
        (other,) = Path(folder, "other.pt.ranks").iterdir()
        before = run.everything()

        def broken(change, error, message):
            if rank == 1:
                change()
            torch.distributed.barrier()
            with pytest.raises(error, match=f"^rank 1 could not read .*last.pt: {error.__name__}: .*rank-1-of-2.pt {message}"):
                run.load(path)
            assert_same(run.everything(), before)
            torch.distributed.barrier()
            second.parent.mkdir(exist_ok=True)
            if rank == 1:
                second.write_bytes(kept)

        with pytest.raises(FileNotFoundError, match=r"rank 0 could not read .*nowhere.pt: "):
            run.load(Path(folder, "nowhere.pt"))
        broken(second.unlink, FileNotFoundError, "is missing: move and copy")
        broken(lambda: second.write_bytes(kept[:1000]), ValueError, "is torn")
        broken(lambda: second.write_bytes(b""), ValueError, "is torn")
        broken(lambda: shutil.copy(first, second), ValueError, "does not belong to .*'rank': 1.*got .*'rank': 0")
        broken(lambda: shutil.copy(other / second.name, second), ValueError, "does not belong to .*got .*'rounds': .4.")
        broken(lambda: torch.save([1], second), ValueError, r"does not belong to .*got \[1\]")
        torch.distributed.barrier()
        if rank == 1:
            shutil.rmtree(f"{path}.ranks")
            Path(f"{path}.ranks").mkdir()
            shutil.copytree(other, Path(f"{path}.ranks", other.name))
        torch.distributed.barrier()
        with pytest.raises(FileNotFoundError, match="rank 0 could not read"):
            run.load(path)
        assert_same(run.everything(), before)
    return True


def test_a_missing_or_wrong_file_is_named_on_all_ranks_and_nothing_changes(tmp_path):
    """Catches a rank that goes on while another has no file, files of another rank or save, and a run half restored."""
    assert run_ranks(load_broken, 2, str(tmp_path)) == [True] * 2


def save_without_room(rank, world_size, folder):
    path = Path(folder, "last.pt")
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)

    def contents():
        torch.distributed.barrier()
        return {found: found.read_bytes() for found in Path(folder).rglob("*") if found.is_file()}

    with Run(rank) as run:
        run.train()
        run.save(path)
        before = contents()
        saved = run.everything()
        run.train()
        for full, room in ((1, 1000), (0, 100_000)):
            if rank == full:
                resource.setrlimit(resource.RLIMIT_FSIZE, (room, unlimited[1]))
            # What the operating system says, not what torch makes of it.
            message = rf"^rank {full} could not write its file of \S*last.pt: OSError: \[Errno 27\] File too large$"
            with pytest.raises(RuntimeError, match=message):
                run.save(path, ballast=torch.zeros(50_000) if full == 0 else 0)
            resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
            assert contents() == before
        if rank == 1:
            run.optimizer.param_groups[0]["note"] = path  # could be written, but not read with weights_only=True
        with pytest.raises(RuntimeError, match=r"^rank 1 could not write its file .*TypeError: .* holds pathlib"):
            run.save(path)
        run.load(path)
        assert_same(run.everything(), saved)
    with Run(rank, "gradient_allreduce") as run:
        if rank == 0:
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, unlimited[1]))
        with pytest.raises(RuntimeError, match=r"^rank 0 could not write \S*last.pt: OSError: \[Errno 27\] File too large$"):
            run.save(path, ballast=torch.zeros(50_000))
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
        assert contents() == before
    return True


def test_a_save_that_fails_on_one_rank_leaves_the_old_one(tmp_path):
    """Catches a full disk on one rank that the others do not hear of, and an old checkpoint that lost its files."""
    assert run_ranks(save_without_room, 2, str(tmp_path)) == [True] * 2


def die(*arguments, **options):
    os.kill(os.getpid(), signal.SIGKILL)


def die_writing(saved, file):
    file.write(b"PK")
    file.flush()
    die()


def save_and_be_killed(rank, world_size, folder, victim, place):
    path = Path(folder, "last.pt")
    with Run(rank) as run:
        run.train()
        run.save(path)
        before = run.everything()
        run.train()
        if rank == victim and place == "after its file":
            write = files.write_file
            files.write_file = lambda *arguments: die(write(*arguments))
        if rank == victim and place == "in the middle of the checkpoint":
            save = torch.save
            torch.save = lambda saved, file, **options: (die_writing if "model" in saved else save)(saved, file, **options)
        if rank == victim and place == "before older files are removed":
            save_load.remove_rank_files = die
        if rank != victim and place != "before older files are removed":
            with pytest.raises(Exception, match=r"."):  # torch's words for a lost peer
                run.save(path)
        else:
            run.save(path)
        return before, run.everything()


def resume_and_save(rank, world_size, folder):
    path = Path(folder, "last.pt")
    with Run(rank) as run:
        run.load(path)
        found = run.everything()
        run.save(path)
        torch.distributed.barrier()
        return found, sorted(found.name for found in Path(folder).rglob("*"))


@pytest.mark.parametrize(
    ("victim", "place"),
    [
        (1, "after its file"),
        (0, "after its file"),
        (0, "in the middle of the checkpoint"),
        (0, "before older files are removed"),
    ],
)
def test_a_rank_killed_while_saving_leaves_a_checkpoint_with_its_files(tmp_path, victim, place):
    """Catches an order of writing that has a moment without a checkpoint that can be resumed."""
    survivor = 1 - victim
    killed = run_ranks(save_and_be_killed, 2, str(tmp_path), victim, place, lost=[victim])
    # Rank 0, if it lives, takes back what was begun.
    assert len(list((tmp_path / "last.pt.ranks").iterdir())) == 2 - (victim == 1)
    assert len(list(tmp_path.glob(".*.incomplete"))) == (place == "in the middle of the checkpoint")
    before, after = killed[survivor]
    resumed = run_ranks(resume_and_save, 2, str(tmp_path))
    assert_same(resumed[survivor][0], after if place == "before older files are removed" else before)
    # The next save removes what the killed one has left.
    names = {"last.pt", "last.pt.ranks", "rank-0-of-2.pt", "rank-1-of-2.pt"}
    for _, left in resumed:
        assert len(left) == 5
        assert names < set(left)


def move_and_link(rank, world_size, folder):
    path, link, moved = (Path(folder, name) for name in ("a.pt", "link.pt", "b.pt"))
    with Run(rank) as run:
        run.train()
        run.save(path)
        saved = run.everything()
        if rank == 0:
            link.symlink_to(path.name)
        torch.distributed.barrier()
        run.train(1)
        run.load(link)
        assert_same(run.everything(), saved)
        torch.distributed.barrier()
        if rank == 0:
            path.rename(moved)
            Path(f"{path}.ranks").rename(f"{moved}.ranks")
        torch.distributed.barrier()
        run.train(1)
        run.load(moved)
        assert_same(run.everything(), saved)
    # A file of the same name by an algorithm that needs no files has none.
    with Run(rank, "bytegrad") as run:
        run.save(moved)
        torch.distributed.barrier()
        assert not Path(f"{moved}.ranks").exists()
    return True


def test_a_checkpoint_may_be_moved_and_linked(tmp_path):
    """Catches files that are found by the path of the save, and those of a checkpoint that was overwritten."""
    assert run_ranks(move_and_link, 2, str(tmp_path)) == [True] * 2


def load_into_another(rank, world_size, folder):
    path, heard = Path(folder, "a.pt"), heard_by()
    with Run(rank) as run:
        run.train()
        run.save(path)
    with Run(rank, "gradient_allreduce") as run:
        run.load(path)
        found = run.everything()
    return found, heard


def test_another_algorithm_takes_model_and_optimizers_alone(tmp_path):
    """Catches optimizers that differ between ranks under an algorithm that needs them equal."""
    (one, heard), (other, _) = run_ranks(load_into_another, 2, str(tmp_path))
    assert differ(one, other) == {"torch", "python"}
    assert heard == ["the checkpoint is of algorithm 'drifting', this run uses 'gradient_allreduce': its state starts anew"]
