"""Sizes, values and comparisons: to the bit, NaN and the sign of zero included."""

import torch

CODECS = ("none", "fp16", "bf16", "int8", "minmax_uint8", "int4", "sign")
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)

SIZES = (0, 1, 7, 511, 512, 513, 99_991)
"""Nothing, one element, less than a block, a block and its neighbours, and a prime number of elements."""

_BITS = {torch.float32: torch.int32, torch.float16: torch.int16, torch.bfloat16: torch.int16, torch.float64: torch.int64}


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """The bit patterns, as integers."""
    return tensor.detach().contiguous().view(_BITS.get(tensor.dtype, tensor.dtype))


def assert_same_bits(actual: torch.Tensor, expected: torch.Tensor, what: object = "") -> None:
    """Fails where two tensors, on whatever devices, differ in shape, dtype or any bit, and shows the first place."""
    actual, expected = actual.detach().cpu(), expected.detach().cpu()
    assert actual.dtype == expected.dtype, f"{what}: {actual.dtype}, expected {expected.dtype}"
    assert actual.shape == expected.shape, f"{what}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    differ = (bits(actual) != bits(expected)).flatten().nonzero().flatten()
    if differ.numel():
        place = int(differ[0])
        got, want = actual.flatten()[place].item(), expected.flatten()[place].item()
        raise AssertionError(f"{what}: {differ.numel()} elements differ, the first at {place}: {got!r}, expected {want!r}")


def normal(numel: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Normal values whose size changes from block to block, over eight orders of magnitude."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(numel, generator=generator, dtype=torch.float64)
    exponents = torch.randint(-4, 4, (-(-numel // 512),), generator=generator).repeat_interleave(512)[:numel]
    return (values * 10.0**exponents).to(dtype)


def awkward(dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """A block for each kind of trouble, and a short one at the end. In this dtype: small ones may be zero, big ones Inf."""
    noise = normal(512, torch.float64, seed).clamp(-3, 3) / 3
    ties = (torch.arange(512, dtype=torch.float64) - 255.5) / 2  # half-way between codes where the scale is 1
    ties[0] = 127.0
    small = 2.0**-100
    blocks = {
        "zeros": torch.zeros(512, dtype=torch.float64),
        "negative zeros": -torch.zeros(512, dtype=torch.float64),
        "constant": torch.full((512,), -0.37, dtype=torch.float64),
        "ties": ties.clamp(-127, 127),
        "outlier": _with(noise * 1e-3, 77, 40.0),
        "one large negative": _with(noise * 1e-3, 500, -40.0),
        "positive": noise.abs() + 0.5,
        "negative": -noise.abs() - 0.5,
        "large mean, small range": 10 + noise * 1e-3,
        "range of one last place": 1 + (noise > 0) * 2.0**-23,
        "below the smallest scale": noise * small * 0.999,
        "at the smallest scale": _with(noise * small, 3, small),
        "subnormal float32": noise * 1e-41,
        "subnormal float16": noise * 1e-6,
        "largest float16": noise * 65504,
        "largest float32": _with(_with(noise * 3.4e38, 0, 3.4028234663852886e38), 1, -3.4028234663852886e38),
        "NaN": _with(noise, 511, float("nan")),
        "Inf": _with(noise, 0, float("inf")),
        "-Inf": _with(noise, 200, -float("inf")),
        "Inf and -Inf": _with(_with(noise, 9, float("inf")), 8, -float("inf")),
        "beyond float32": _with(noise, 100, 1e300),
        "after the trouble": noise,
        "short": noise[:77],
    }
    values = torch.cat(list(blocks.values())).to(dtype)
    # NaNs with a sign and a payload, in a block of their own kind.
    payload = {torch.float32: 0xFFC12345, torch.float16: 0xFE15, torch.bfloat16: 0xFFD1, torch.float64: 0xFFF8000012345678}[dtype]
    width = 8 * dtype.itemsize
    place = 512 * list(blocks).index("NaN") + 300
    bits(values)[place] = payload - (1 << width)
    return values


def _with(values: torch.Tensor, place: int, value: float) -> torch.Tensor:
    values = values.clone()
    values[place] = value
    return values


def assert_same_tree(actual: object, expected: object, what: str = "") -> None:
    """Fails where two trees of dicts, lists, tensors and plain values differ in shape or in any bit, and names the place."""
    assert isinstance(actual, type(expected)), f"{what}: {type(actual).__name__}, expected {type(expected).__name__}"
    if isinstance(expected, torch.Tensor):
        assert_same_bits(actual, expected, what)
    elif isinstance(expected, dict):
        assert actual.keys() == expected.keys(), f"{what}: {sorted(map(str, actual))}, expected {sorted(map(str, expected))}"
        for key, value in expected.items():
            assert_same_tree(actual[key], value, f"{what}[{key!r}]")
    elif isinstance(expected, (list, tuple)):
        assert len(actual) == len(expected), f"{what}: {len(actual)} items, expected {len(expected)}"
        for place, value in enumerate(expected):
            assert_same_tree(actual[place], value, f"{what}[{place}]")
    else:
        assert actual == expected, f"{what}: {actual!r}, expected {expected!r}"


def outline(tree: object) -> object:
    """Shapes and dtypes in place of tensors, types in place of other values."""
    if isinstance(tree, torch.Tensor):
        return str(tree.dtype), list(tree.shape)
    if isinstance(tree, dict):
        return {key: outline(value) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return [outline(value) for value in tree]
    return type(tree).__name__
