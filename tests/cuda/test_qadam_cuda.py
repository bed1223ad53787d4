"""QAdam's CUDA passes write what the CPU's do, byte for byte."""

import pytest
import torch

from lightning_accel import _native
from lightning_accel.native import DTYPES, run_kernel

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU"),
]

NUMELS = [0, 1, 511, 512, 513, 70_001, *range(2, 200)]  # more tensors than a launch takes
DEVICE = "cuda"
OPERANDS = 4  # gradient, momentum, variance, parameter


def run(memory, offsets, weight_decay):
    """Both passes over the tensors in `memory`, which begin at `offsets`, one row an operand."""
    dtype = DTYPES.index(memory.dtype)
    at = [
        [memory.data_ptr() + (operand * memory.shape[1] + offset) * memory.element_size() for operand in range(OPERANDS)]
        for offset in offsets
    ]
    folds = [(g, m, x, numel) for (g, m, v, x), numel in zip(at, NUMELS, strict=True)]
    run_kernel(_native.qadam_fold, memory.device, dtype, folds, 0.9, weight_decay, 1)
    steps = [(*addresses, numel) for addresses, numel in zip(at, NUMELS, strict=True)]
    run_kernel(_native.qadam_step, memory.device, dtype, steps, 1e-3, 0.3, 1e-8, 1 - 1e-3 * weight_decay, 1)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("gap", [0, 1])
def test_passes(dtype, weight_decay, gap):
    """Catches contraction, approximate division and roots, wrong guards, a tensor left out or taken twice; what lies between the
    tensors must stay."""
    generator = torch.Generator().manual_seed(5)
    offsets, end = [], 3 * gap
    for numel in NUMELS:
        start = end if gap else -(-end // 8) * 8  # tensors aligned to 16 bytes, or to anything
        offsets.append(start)
        end = start + numel + gap
    on_cpu = torch.randn(OPERANDS, -(-end // 8) * 8 + 8, dtype=torch.float64, generator=generator)
    on_cpu[2] = on_cpu[2] ** 2
    on_cpu[:, 5000::3000] *= 1e-30  # down to subnormals
    on_cpu[:, 7000::9000] = float("nan")
    on_cpu = on_cpu.to(dtype)
    on_cuda = on_cpu.to(DEVICE)
    run(on_cpu, offsets, weight_decay)
    run(on_cuda, offsets, weight_decay)
    assert torch.equal(on_cpu.view(torch.uint8), on_cuda.cpu().view(torch.uint8))
