"""Means and differences of weights: the GPU's bits are the CPU's."""

import pytest
import torch

from lightning_accel.algorithms.common.flat_weights import FlatWeights
from lightning_accel.collectives import ring, weight_means

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU"),
]

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
SIZES = (0, 1, 255, 256, 257, 99_991, 20_000_003)
GUARD = 64  # elements behind the end


def same_bits(ours, theirs):
    kinds = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    return torch.equal(ours.cpu().view(kinds[ours.itemsize]), theirs.view(kinds[theirs.itemsize]))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("numel", SIZES)
def test_mean_of_rows(dtype, numel):
    """Catches sums in another order or type, a lost tail, and elements written behind the end."""
    for count in (1, 2, 3, 7) if numel < 10**6 else (3,):
        rows = torch.randn(count * numel, dtype=torch.float64).to(dtype)
        expected = torch.full((numel + GUARD,), 7, dtype=dtype)
        got = expected.cuda()
        weight_means.mean_of_rows(rows, count, expected[:numel])
        weight_means.mean_of_rows(rows.cuda(), count, got[:numel])
        assert same_bits(got, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("numel", SIZES)
def test_difference_to_neighbours(dtype, numel):
    """As above, and contraction into fused operations."""
    x, w, left, right = (torch.randn(numel + GUARD, dtype=torch.float64).to(dtype) for _ in range(4))
    on_gpu = [tensor.cuda() for tensor in (x, w, left, right)]
    ring.difference_to_neighbours(x[:numel], w[:numel], left[:numel], right[:numel])
    ring.difference_to_neighbours(*(tensor[:numel] for tensor in on_gpu))
    assert same_bits(on_gpu[0], x)


def test_flat_weights_there_and_back():
    """Catches weights of channels_last or of mixed dtypes that change on the way."""
    tensors = [torch.randn(5, 3, 7, 7).to(memory_format=torch.channels_last), torch.randn(11).half(), torch.randn(3).double()]
    on_gpu = [tensor.cuda() for tensor in tensors]
    flat = FlatWeights(on_gpu)
    buffers = flat.allocate(multiple=8)
    flat.gather(buffers)
    assert same_bits(buffers[0][: flat.numels[0]], tensors[0].flatten())
    for tensor in on_gpu:
        tensor.zero_()
    flat.scatter(buffers)
    for ours, theirs in zip(on_gpu, tensors, strict=True):
        assert same_bits(ours.flatten(), theirs.flatten())
