"""Where a checkpoint and the ranks' states are: at a path that ranks agree on, beside it or inside it, here or at a URL."""

import os
import re
import shutil
from pathlib import Path
from unittest import mock

import fsspec
import pytest
import torch
import torch.distributed as dist

import lightning_accel as accel
from helpers.ranks import run_ranks
from helpers.saved_runs import STEPS, Run, assert_same, differ, heard_by
from helpers.shelf import beside, listed


def save_and_resume(rank, path, **options):
    """Whether a run that is resumed from this path is the one that saved there, to the bit."""
    with Run(rank) as whole:
        whole.train()
        whole.save(path, mine=rank, **options)
        saved = whole.everything()
        whole.train()
        expected = whole.everything()
    with Run(rank) as resumed:
        resumed.train(1)
        assert resumed.load(path) == {"mine": rank}
        assert_same(resumed.everything(), saved)
        resumed.train()
        assert_same(resumed.everything(), expected)
    return saved


def agree(rank, world_size, folder):
    """Each rank has a name of its own for the checkpoint, as with a metric or a number of steps in it."""
    path = Path(folder, f"loss={rank}.pt")
    save_and_resume(rank, path)
    assert listed(folder) == beside("loss=0.pt", STEPS)
    save_and_resume(rank, path)
    assert listed(folder) == beside("loss=0.pt", STEPS), "the files of the save before are removed"
    # A file of this rank's name, of another run, is not read.
    with Run(rank) as other:
        other.train(1)
        other.save(Path(folder, "loss=1.pt"))
        other.load(path)
        assert other.ddp.replica.rounds == STEPS


def test_rank_0s_path_is_everybodys(tmp_path):
    """Catches ranks' files in folders of other names, which no resume finds and no save removes."""
    run_ranks(agree, 2, str(tmp_path))


def go_inside(rank, world_size, folder):
    path = Path(folder, "inside.pt")
    saved = save_and_resume(rank, path, rank_files="inside")
    assert listed(folder) == ["inside.pt"]
    # Saved beside and inside in turn: nothing is left of the other.
    save_and_resume(rank, path, rank_files="beside")
    assert listed(folder) == beside("inside.pt", STEPS, world_size)
    save_and_resume(rank, path, rank_files="inside")
    assert listed(folder) == ["inside.pt"]
    with Run(rank) as run:
        for options in ({"rank_files": "elsewhere"}, {"rank_files": None}):
            with pytest.raises(ValueError, match="rank_files must be one of 'auto', 'beside', 'inside': got "):
                run.save(path, **options)
    return saved


def test_all_ranks_states_fit_inside_the_checkpoint(tmp_path):
    """Catches one rank's state on all of them, and states that arrive in another order."""
    ranks = run_ranks(go_inside, 3, str(tmp_path))
    assert differ(ranks[1], ranks[2]) == {"optimizer", "residual", "torch", "python"}, "a test of equal ranks could not fail"


def go_far(rank, world_size, folder):
    heard = heard_by()
    for name, options in (("far.pt", {}), ("all.pt", {"rank_files": "inside"}), ("far.pt", {})):
        save_and_resume(rank, f"shelf://{folder}/{name}", **options)
    assert listed(folder) == ["all.pt", *beside("far.pt", STEPS)]
    save_and_resume(rank, f"file://{folder}/near.pt")
    assert listed(folder) == ["all.pt", *beside("far.pt", STEPS), *beside("near.pt", STEPS)]
    with Run(rank, "gradient_allreduce") as run:
        run.save(f"shelf://{folder}/far.pt")
    assert listed(folder) == ["all.pt", "far.pt", *beside("near.pt", STEPS)]

    # A file system of one process: the ranks' files would be lost with their processes.
    with Run(rank) as run:
        run.train(1)
        with pytest.raises(RuntimeError, match=r"rank 1 could not see memory://a.pt.ranks/.*use 'auto' or 'inside'"):
            run.save("memory://a.pt", rank_files="beside")
        run.save("memory://a.pt")
        with pytest.raises(FileNotFoundError, match=r"^rank 1 could not read memory://a.pt"):
            run.load("memory://a.pt")
    files = fsspec.filesystem("memory").find("/")
    assert files == (["/a.pt"] if rank == 0 else [])
    if rank == 0:
        with fsspec.open("memory://a.pt") as file:
            assert len(torch.load(file)["lightning_accel"]["ranks"]) == world_size

    # What no file system is known for fails at the checkpoint itself, with the reason.
    with Run(rank) as run, pytest.raises(ValueError, match=r"^rank 0 could not write nowhere://a.pt: ValueError: .*nowhere"):
        run.save("nowhere://a.pt")
    assert heard == []


def test_urls_are_paths(tmp_path):
    """Catches refusals without need, a folder named "shelf:", and ranks' files where only their own process sees them."""
    run_ranks(go_far, 2, str(tmp_path))


def be_alone(rank, world_size, folder):
    heard = heard_by()
    save_and_resume(rank, Path(folder, "a.pt"))
    save_and_resume(rank, Path(folder, "b.pt"), rank_files="beside")
    save_and_resume(rank, "memory://c.pt")
    with Run(rank, "decentralized") as run:
        run.train(1)
        run.save(Path(folder, "d.pt"))
        run.load(Path(folder, "d.pt"))
    assert listed(folder) == ["a.pt", "b.pt", "d.pt"]
    assert heard == []


def test_one_rank_has_one_file(tmp_path):
    """Catches a folder of rank files that holds what the checkpoint has, and a state of its own that gets lost without it."""
    run_ranks(be_alone, 1, str(tmp_path))


def lose(rank, world_size, folder):
    path, heard = Path(folder, "a.pt"), heard_by()
    with Run(rank) as run:
        run.train()
        run.save(path)
        saved = run.everything()
        run.save(Path(folder, "inside.pt"), rank_files="inside")
        dist.barrier()
        if rank == 0:
            shutil.rmtree(f"{path}.ranks")
        dist.barrier()
        with pytest.raises(FileNotFoundError, match=r"rank-0-of-2.pt is missing: .* restore_rank_state=False goes on with"):
            run.load(path)
        assert heard == []
        found = {}
        for name in ("a.pt", "inside.pt"):
            run.train(1)
            run.load(Path(folder, name), restore_rank_state=False)
            found[name] = run.everything()
        run.train(1)
    return saved, found, heard


def test_a_run_goes_on_without_the_ranks_states_if_told_so(tmp_path):
    """Catches a checkpoint that is lost because a rank's file is, and a silent loss."""
    (saved, found, heard), (other, others, nothing) = run_ranks(lose, 2, str(tmp_path))
    for run, own in ((found, saved), (others, other)):
        for state in run.values():
            assert differ(state, saved) - {"torch", "python"} == {"residual"}, "model and optimizers are rank 0's"
            assert not any(value.any() for name, value in state.items() if name.startswith("residual"))
            assert not differ(state, own) & {"torch", "python"}, "generators are in the checkpoint"
    assert [line.partition(":")[0] for line in heard] == ["restore_rank_state=False"] * 2
    assert nothing == []


def change_nodes(rank, world_size, folder):
    heard, seen = heard_by(), {}

    def on(*nodes):
        node = next(name for name, ranks in enumerate(nodes) if rank in ranks)
        return mock.patch.dict(os.environ, {"GROUP_RANK": str(node)})

    layouts = {"2x2": ([0, 1], [2, 3]), "1x4": ([0, 1, 2, 3],), "2x2, dealt": ([0, 2], [1, 3])}
    for name, nodes in layouts.items():
        with on(*nodes), Run(rank, accel.ByteGrad(codec="int4")) as run:
            run.train()
            run.save(Path(folder, name))
            seen[name] = run.everything()
    for name, nodes in layouts.items():
        for source in layouts:
            heard.clear()
            with on(*nodes), Run(rank, accel.ByteGrad(codec="int4")) as run:
                run.train(1)
                run.load(Path(folder, source))
                found = run.everything()
                run.train(1)
            if source == name:
                assert_same(found, seen[source])
                assert heard == []
            else:
                differing = {one for one in found if one not in seen[source] or not torch.equal(found[one], seen[source][one])}
                assert {one.split()[0] for one in differing} <= {"residual"}
                assert not any(value.any() for one, value in found.items() if one.startswith("residual"))
                assert len(heard) == (rank == 0)
                assert all(re.match("the checkpoint's residuals are laid out for .* they start anew", line) for line in heard)


def test_residuals_of_other_nodes_start_anew(tmp_path):
    """Catches an error once half is restored, and residuals of other elements where sizes happen to be equal."""
    run_ranks(change_nodes, 4, str(tmp_path))


def have_long_names(rank, world_size, folder):
    heard = heard_by()
    longest = Path(folder, "x" * 252 + ".pt"[:3])
    with Run(rank, "gradient_allreduce") as run:
        for _ in range(2):
            run.save(longest)
        run.load(longest)
    save_and_resume(rank, longest)
    assert listed(folder) == [longest.name]
    with Run(rank) as run:
        with pytest.raises(RuntimeError, match=r"^rank 0 could not write .*: OSError: .Errno 36. File name too long") as error:
            run.save(longest, rank_files="beside")
        assert str(error.value).count("File name too long") == 1
        with pytest.raises(RuntimeError, match=r"^rank 0 could not write .*: OSError: .Errno 36. File name too long") as error:
            run.save(f"{longest}x")
        assert str(error.value).count("File name too long") == 1
    assert listed(folder) == [longest.name]
    assert heard == []


def test_a_name_may_be_as_long_as_the_file_system_allows(tmp_path):
    """Catches names of ours, made of the checkpoint's, that are too long where its own is not."""
    run_ranks(have_long_names, 2, str(tmp_path))
