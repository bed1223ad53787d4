"""Weights in flat buffers, and the kernels that work on these."""

import pytest
import torch

from helpers.tensors import DTYPES, assert_same_bits, normal
from lightning_accel import _native
from lightning_accel.algorithms.common.flat_weights import FlatWeights, segments
from lightning_accel.collectives import ring, weight_means
from lightning_accel.reference.weights import mean


@pytest.fixture
def tensors():
    """Of mixed dtypes and memory formats; one comes twice, one is empty."""
    image = torch.randn(3, 2, 5, 5).to(memory_format=torch.channels_last)
    half = normal(7, torch.float16, seed=1)
    made = [torch.randn(11), half, image, torch.zeros(0), torch.randn(2, 3, dtype=torch.float64), torch.arange(4), half]
    return [t.requires_grad_() if t.is_floating_point() and t.is_leaf else t for t in made]


def test_buffers_hold_the_tensors_in_their_order(tensors):
    """Catches a tied weight that travels twice, and channels_last weights in the order of memory."""
    flat = FlatWeights(tensors)
    assert flat.dtypes == [torch.float32, torch.float16, torch.float64, torch.int64]
    assert flat.numels == [11 + 150, 7, 6, 4]
    assert flat.parts == [[11, 150, 0], [7], [6], [4]]
    buffers = flat.allocate()
    flat.gather(buffers)
    assert_same_bits(buffers[0], torch.cat([tensors[0].detach(), tensors[2].detach().flatten()]))
    assert_same_bits(buffers[1], tensors[1].detach())
    assert_same_bits(buffers[3], tensors[5])
    assert not any(buffer.requires_grad for buffer in buffers)


def test_there_and_back(tensors):
    """Catches a copy that changes bits or the memory format, and a second set of buffers that takes the first one's views."""
    flat = FlatWeights(tensors)
    before = [tensor.detach().clone() for tensor in tensors]
    first, second = flat.allocate(), flat.allocate(multiple=4)
    assert [buffer.numel() for buffer in second] == [164, 8, 8, 4]
    flat.gather(first)
    flat.scatter(second)
    assert all(not tensor.any() for tensor in tensors)
    flat.scatter(first)
    flat.gather(second)
    for tensor, was in zip(tensors, before, strict=True):
        assert_same_bits(tensor.detach(), was)
    assert tensors[2].is_contiguous(memory_format=torch.channels_last)
    assert_same_bits(second[0][:161], first[0])
    assert not second[0][161:].any()


def test_halves_lie_in_float32_if_asked(tensors):
    """Catches a replica of bfloat16 weights that is bfloat16: small differences would be lost at every step."""
    flat = FlatWeights(tensors[:6], widen=True)
    assert flat.dtypes == [torch.float32, torch.float64, torch.int64]
    assert flat.parts[0] == [11, 7, 150, 0]
    buffers = flat.allocate()
    flat.gather(buffers)
    assert_same_bits(buffers[0][11:18], tensors[1].detach().float())
    buffers[0][11:18] += 1
    flat.scatter(buffers)
    assert_same_bits(tensors[1].detach(), buffers[0][11:18].half())


def test_nothing_is_allocated_in_steady_state(tensors):
    """Catches views or staging that are made in every step."""
    flat = FlatWeights(tensors)
    buffers = flat.allocate()
    flat.gather(buffers)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        flat.gather(buffers)
        flat.scatter(buffers)
    assert max((event.self_cpu_memory_usage for event in profile.key_averages()), default=0) == 0


def test_segments_of_a_share():
    """Catches blocks that cross a parameter or a share, and padding that is sent."""
    parts = [5, 0, 7, 3]
    assert segments(parts, 0, 16) == ([0, 5, 12], [5, 7, 3])
    assert segments(parts, 0, 8) == ([0, 5], [5, 3])
    assert segments(parts, 8, 16) == ([0, 4], [4, 3])
    assert segments(parts, 15, 16) == ([], [])


@pytest.mark.parametrize("instruction_set", _native.instruction_sets())
@pytest.mark.parametrize("dtype", DTYPES)
def test_mean_of_rows(dtype, instruction_set):
    """Catches sums in the dtype itself: means of 16-bit floats would lose bits, and the mean of three equal ones change."""
    before = _native.instruction_set()
    _native.use_instruction_set(instruction_set)
    try:
        for count in (1, 2, 3, 7):
            for numel in (0, 1, 127, 128, 1001):
                rows = torch.stack([normal(numel + 1, dtype, seed=k) for k in range(count)])[:, 1:].contiguous()
                out = torch.empty(numel + 1, dtype=dtype)[1:]
                weight_means.mean_of_rows(rows.view(-1), count, out)
                assert_same_bits(out, mean(list(rows)), f"{count} rows of {numel}")
                if dtype != torch.float64:
                    weight_means.mean_of_rows(rows[:1].expand(count, -1).contiguous(), count, out)
                    assert_same_bits(out, rows[0], f"{count} equal rows of {numel}")
    finally:
        _native.use_instruction_set(before)


@pytest.mark.parametrize("instruction_set", _native.instruction_sets())
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_difference_to_neighbours(dtype, instruction_set):
    """Catches another formula, contraction into fused operations, and noise where all agree."""
    before = _native.instruction_set()
    _native.use_instruction_set(instruction_set)
    try:
        for numel in (0, 1, 1001):
            w, left, right, x = (normal(numel, dtype, seed=k) for k in range(4))
            expected = (x - w) + ((left - w) + (right - w)) / 3
            d = x.clone()
            ring.difference_to_neighbours(d, w, left, right)
            assert_same_bits(d, expected)
            torch.testing.assert_close(d, x + left / 3 + right / 3 - 5 * w / 3, rtol=1e-4, atol=1e-1)
            same = w.clone()
            ring.difference_to_neighbours(same, w, w, w)
            assert not same.any()
    finally:
        _native.use_instruction_set(before)


def test_kernels_check_what_would_corrupt_memory():
    """Catches a null pointer that is written to."""
    with pytest.raises(ValueError, match="at least one row is needed, got 0"):
        _native.mean(0, 16, 0, 16, 1, False, 0)
    with pytest.raises(ValueError, match="a buffer has no memory"):
        _native.mean(0, 0, 1, 16, 1, False, 0)
    with pytest.raises(ValueError, match="replicas are float32 or float64, got dtype 1"):
        _native.ring_difference(1, 16, 16, 16, 16, 0, False, 0)
    with pytest.raises(ValueError, match="no CUDA kernels" if not _native.CUDA_ARCHITECTURES else ""):
        _native.mean(0, 0, 1, 0, 0, True, 0) if not _native.CUDA_ARCHITECTURES else _native.mean(9, 0, 1, 0, 0, False, 0)
