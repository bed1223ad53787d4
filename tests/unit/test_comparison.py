"""Digests of tensors: equal for equal bits, whatever the memory looks like, and different for others."""

import random

import pytest
import torch

from helpers.tensors import SIZES, awkward, normal
from lightning_accel.collectives.comparison import digests

DTYPES = [
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float64,
    torch.complex64,
    torch.float8_e5m2,
    torch.int64,
    torch.bool,
]


def digest_in_python(data):
    """Rows of 1024 signed numbers of 32 bits times fixed random numbers, summed modulo 2^64; then rows of the sums."""
    source = random.Random(1024)
    keys = [source.getrandbits(64) - 2**63 for _ in range(1024)]
    while True:
        rows = [data[k : k + 4096].ljust(4096, b"\0") for k in range(0, len(data), 4096)]
        sums = []
        for row in rows:
            lanes = [int.from_bytes(row[k : k + 4], "little", signed=True) for k in range(0, 4096, 4)]
            sums.append(sum(lane * key for lane, key in zip(lanes, keys, strict=True)) % 2**64)
        if len(sums) == 1:
            return sums[0]
        data = b"".join(value.to_bytes(8, "little") for value in sums)


@pytest.mark.parametrize("num_bytes", [1, 8, 4095, 4096, 4097, 1_048_576, 4096 * 513 + 3])
def test_the_digest_is_the_specified_one(num_bytes):
    """Catches a digest that depends on how much is summed at once, and one that leaves out a tail or a level."""
    tensor = torch.randint(256, (num_bytes,), dtype=torch.uint8, generator=torch.Generator().manual_seed(num_bytes))
    expected = digest_in_python(bytes(tensor.tolist()))
    assert digests([tensor])[0].item() % 2**64 == expected
    beside = [torch.ones(()), torch.empty_strided((1 + num_bytes,), (1,), dtype=torch.uint8)[1:].copy_(tensor), torch.zeros(0)]
    assert digests(beside)[1].item() % 2**64 == expected


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equal_bits_have_equal_digests(dtype):
    """Catches digests of memory instead of elements, and of values instead of bits."""
    values = torch.randint(2, (4, 6, 8, 10), generator=torch.Generator().manual_seed(1)).to(dtype)
    strided = torch.stack([values, values], -1)[..., 0]
    forms = [values, values.to(memory_format=torch.channels_last), strided, values.transpose(0, 1).contiguous().transpose(0, 1)]
    large = [torch.cat([form] * 9) for form in forms]
    assert len(set(digests(forms).tolist())) == 1
    assert len(set(digests(large).tolist())) == 1


@pytest.mark.parametrize("numel", [1, 3, 1023, 1024, 1025, *SIZES[3:]])
def test_unequal_bits_have_unequal_digests(numel):
    """Catches norms, sums without order, and NaNs or zeros of either sign that count as the same."""
    tensor = normal(numel, torch.float32, seed=numel)
    others = {"negated": -tensor, "one larger": tensor.clone(), "NaN": tensor.clone(), "other NaN": tensor.clone()}
    others["one larger"].view(torch.int32)[-1] += 1
    others["NaN"].view(torch.int32)[numel // 2] = 0x7FC00000
    others["other NaN"].view(torch.int32)[numel // 2] = 0x7FC00001
    if numel > 1:
        others |= {"reversed": tensor.flip(0), "moved": tensor.roll(1), "two signs": tensor.clone()}
        others["two signs"][[0, -1]] *= -1
    if numel > 1024:
        others["rows exchanged"] = tensor.roll(1024)
    found = digests([tensor, *others.values(), tensor.clone()]).tolist()
    assert found[0] == found[-1]
    assert len(set(found)) == 1 + len(others), found


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_every_bit_counts(dtype):
    """Catches bits that are lost in a conversion or beyond the sum."""
    tensor = awkward(dtype)
    integers = {8: torch.int64, 4: torch.int32, 2: torch.int16}[dtype.itemsize]
    found = {digests([tensor])[0].item()}
    for bit in range(8 * dtype.itemsize):
        flipped = tensor.clone()
        flipped.view(integers)[700] ^= torch.tensor(1, dtype=integers) << bit
        found.add(digests([flipped])[0].item())
    assert len(found) == 1 + 8 * dtype.itemsize
