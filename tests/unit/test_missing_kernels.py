"""GPUs that an install has no kernels for, on a pretended device: none is here."""

from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from helpers.ranks import run_ranks
from lightning_accel import ByteGrad, GradientAllReduce, native
from lightning_accel.data_parallel.device_kernels import check_kernels
from lightning_accel.transport.topology import Topology


@pytest.mark.parametrize(
    ("architectures", "runs", "does_not"),
    [
        ("", [], [(7, 5), (9, 0)]),
        ("all-major", [(7, 5), (8, 6), (12, 1)], [(7, 0)]),
        ("86", [(8, 6), (8, 9), (9, 0)], [(8, 0), (7, 5)]),
        ("86-real", [(8, 6), (8, 9)], [(8, 0), (9, 0)]),
        ("75-real,80-real,90", [(7, 5), (8, 9), (9, 0), (10, 3)], [(7, 0)]),
        ("90a", [(9, 0)], [(8, 0), (10, 0)]),
        ("120-virtual", [(12, 0), (12, 1)], [(10, 0)]),
    ],
    ids=lambda value: value or "none" if isinstance(value, str) else "",
)
def test_which_gpus_a_build_runs_on(architectures, runs, does_not):
    """Catches a refusal of a GPU that would train, and a build for another one that fails in the first bucket."""
    assert all(native.runs_on(architectures, capability) for capability in runs)
    assert not any(native.runs_on(architectures, capability) for capability in does_not)


def _set_up_without_kernels(rank, world_size):
    """Rank 0 has kernels for its GPU, rank 1 has none."""
    device, topology = torch.device("cuda", rank), Topology.from_names(["a", "b", "a", "b"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
        patch.setattr(torch.cuda, "get_device_name", lambda device: "pretended")
        patch.setattr(native, "kernels", SimpleNamespace(CUDA_ARCHITECTURES="" if rank else "90"))
        check_kernels(GradientAllReduce(), topology, dist.group.WORLD, device)
        check_kernels(ByteGrad(), topology, dist.group.WORLD, torch.device("cpu"))
        told = []
        for algorithm in (ByteGrad(), GradientAllReduce(hierarchical=True)):
            with pytest.raises(RuntimeError) as refused:
                check_kernels(algorithm, topology, dist.group.WORLD, device)
            told.append(str(refused.value))
        return told


def test_all_ranks_refuse_when_one_has_no_kernels():
    """Catches a rank that raises alone, while the others wait for it; an error without a remedy; and a refusal of what works."""
    first, second = run_ranks(_set_up_without_kernels, 2)
    assert first == second
    for message in first:
        assert "on rank 1, cuda:1 (pretended, architecture 90) needs CUDA kernels of its own" in message
        assert "no CUDA kernels" in message
        assert "pip install" in message
        assert "CMAKE_CUDA_ARCHITECTURES=90" in message
