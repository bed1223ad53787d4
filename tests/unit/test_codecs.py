"""Native codecs against their specification, to the bit, for each instruction set this machine runs."""

import threading
from functools import cache

import pytest
import torch

from helpers.tensors import CODECS, DTYPES, SIZES, assert_same_bits, awkward, bits, normal
from lightning_accel import _native
from lightning_accel.compression import operations
from lightning_accel.compression.codecs import uses_feedback
from lightning_accel.compression.error_feedback import Residuals
from lightning_accel.compression.plan import Plan
from lightning_accel.reference import codecs as reference

FILLING = 0xA5


@pytest.fixture(params=_native.instruction_sets())
def instruction_set(request):
    before = _native.instruction_set()
    _native.use_instruction_set(request.param)
    yield request.param
    _native.use_instruction_set(before)


def plan_of(codec: str, tensor: torch.Tensor) -> Plan:
    return Plan(codec, tensor.dtype, [0], [tensor.numel()])


def encoded(plan: Plan, tensor: torch.Tensor) -> torch.Tensor:
    wire = torch.full((plan.wire_bytes,), FILLING, dtype=torch.uint8)
    operations.encode(plan, tensor, wire)
    return wire


def specified(codec: str, tensor: torch.Tensor) -> torch.Tensor:
    """What decoding the code of `tensor` gives, in its dtype."""
    values = reference.quantise(tensor.to(reference.value_dtype(codec, tensor.dtype)), codec)
    return reference.canonical(values.to(tensor.dtype))


@cache
def samples(dtype: torch.dtype) -> list[torch.Tensor]:
    return [normal(numel, dtype, seed=numel) for numel in SIZES] + [awkward(dtype), awkward(dtype, seed=1)[300:]]


@cache
def specified_samples(codec: str, dtype: torch.dtype) -> list[torch.Tensor]:
    return [specified(codec, tensor) for tensor in samples(dtype)]


@cache
def triples(dtype: torch.dtype) -> list[list[torch.Tensor]]:
    """What three ranks hold."""
    return [[tensor, tensor.flip(0) * -3, tensor.flip(0) * 0.7] for tensor in samples(dtype)]


@cache
def specified_means(codec: str, dtype: torch.dtype) -> list[torch.Tensor]:
    means = []
    for tensors in triples(dtype):
        first, second, third = (reference.quantise(tensor.to(reference.value_dtype(codec, dtype)), codec) for tensor in tensors)
        mean = reference.quantise(((first + second) + third) / 3, codec)
        means.append(reference.canonical(mean.to(dtype)))
    return means


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_decoded_code_is_as_specified(codec, dtype, instruction_set):
    """Catches any wrong bit: rounding, scale, block borders, NaN, Inf, zeros, dust, ragged tails."""
    for number, tensor in enumerate(samples(dtype)):
        plan = plan_of(codec, tensor)
        decoded = torch.full_like(tensor, 3.0)
        operations.decode(plan, encoded(plan, tensor), decoded)
        expected = specified_samples(codec, dtype)[number]
        assert_same_bits(decoded, expected, f"sample {number} of {tensor.numel()} elements")


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sum_of_messages_is_as_specified(codec, dtype, instruction_set):
    """Catches another order of summation, a sum in the tensor's dtype, and a division after the second encoding."""
    for number, tensors in enumerate(triples(dtype)):
        plan = plan_of(codec, tensors[0])
        stride_bytes = plan.wire_bytes + 32
        messages = torch.full((3 * stride_bytes,), FILLING, dtype=torch.uint8)
        for k, tensor in enumerate(tensors):
            operations.encode(plan, tensor, messages[k * stride_bytes :])
        wire = torch.full((plan.wire_bytes,), FILLING, dtype=torch.uint8)
        operations.decode_sum_encode(plan, messages, wire, count=3, stride_bytes=stride_bytes, divisor=3)
        mean = torch.full_like(tensors[0], 3.0)
        operations.decode(plan, wire, mean)
        assert_same_bits(mean, specified_means(codec, dtype)[number], f"sample {number}")
        for k in range(3):  # in the place of a message
            in_place = messages.clone()
            wire = in_place[k * stride_bytes :][: plan.wire_bytes]
            operations.decode_sum_encode(plan, in_place, wire, count=3, stride_bytes=stride_bytes, divisor=3)
            operations.decode(plan, wire, mean)
            assert_same_bits(mean, specified_means(codec, dtype)[number], f"sample {number} in the place of message {k}")


def test_messages_are_summed_in_their_order():
    """Catches a tree or a reversed loop: 1 is lost beside 1e8 in one order only."""
    values = [1e8, 1.0, -1e8, 1.0]
    plan = Plan("none", torch.float32, [0], [1])
    messages = torch.cat([encoded(plan, torch.tensor([value])) for value in values])
    wire, total = torch.zeros(plan.wire_bytes, dtype=torch.uint8), torch.zeros(1)
    operations.decode_sum_encode(plan, messages, wire, count=4, stride_bytes=plan.wire_bytes, divisor=1)
    operations.decode(plan, wire, total)
    assert total.item() == 1.0


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_accumulation_adds_the_decoded_values(codec, dtype, instruction_set):
    """Catches an accumulator that is overwritten, or kept in the tensor's dtype."""
    for number in (2, 5, 7):
        tensor = samples(dtype)[number]
        plan = plan_of(codec, tensor)
        start = normal(tensor.numel(), plan.value_dtype, seed=5)
        accumulator = start.clone()
        operations.decode_accumulate(plan, encoded(plan, tensor), accumulator)
        expected = start + reference.quantise(tensor.to(plan.value_dtype), codec)
        # Inf - Inf makes a NaN whose sign the processor chooses.
        assert_same_bits(reference.canonical(accumulator), reference.canonical(expected), f"sample {number}")


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_instruction_set_writes_the_same_bytes(codec, dtype):
    """Catches a contracted multiply-add or a vector path with its own rounding: ranks on other processors would differ."""
    before = _native.instruction_set()
    try:
        for number, tensor in enumerate(samples(dtype)):
            plan = plan_of(codec, tensor)
            messages = []
            for name in _native.instruction_sets():
                _native.use_instruction_set(name)
                pair = torch.cat([encoded(plan, tensor), encoded(plan, tensor.flip(0) * 0.3)])
                wire = torch.full((plan.wire_bytes,), FILLING, dtype=torch.uint8)
                operations.decode_sum_encode(plan, pair, wire, count=2, stride_bytes=plan.wire_bytes, divisor=2)
                messages.append((name, torch.cat([pair, wire])))
            for name, message in messages[1:]:
                assert_same_bits(message, messages[0][1], f"sample {number}, {name}")
    finally:
        _native.use_instruction_set(before)


@pytest.mark.parametrize("codec", ["none", "int8", "minmax_uint8", "bf16"])
def test_large_messages_are_coded_as_small_ones(codec, instruction_set):
    """Catches lines lost or shuffled where large messages bypass the caches, and a wrong split into streams."""
    part = normal(2**20, torch.float16, seed=1)
    plan = plan_of(codec, part)
    expected = torch.empty_like(part)
    operations.decode(plan, encoded(plan, part), expected)

    times = 16 if codec in ("int8", "minmax_uint8") else 8
    tensor = torch.cat([part.repeat(times), part[: 512 * 3 + 77]])
    whole = plan_of(codec, tensor)
    assert whole.wire_bytes > 16 * 2**20
    decoded = torch.empty_like(tensor)
    operations.decode(whole, encoded(whole, tensor), decoded)
    assert (bits(decoded)[: times * 2**20].view(times, -1) == bits(expected)).all()
    # The same values, but for the block that is cut short.
    assert_same_bits(decoded[times * 2**20 :][: 512 * 3], expected[: 512 * 3])
    assert_same_bits(decoded[-77:], specified(codec, part[512 * 3 : 512 * 3 + 77]))


def test_int8_error_is_within_half_a_step():
    """Catches truncation for rounding, and a scale that is not the block's own; the bound is scale/2 (1 + 2^-16)."""
    tensor = normal(100 * 512, torch.float32, seed=3)
    plan = plan_of("int8", tensor)
    decoded = torch.empty_like(tensor)
    operations.decode(plan, encoded(plan, tensor), decoded)
    blocks, errors = tensor.double().reshape(-1, 512), (decoded.double() - tensor.double()).reshape(-1, 512)
    bound = blocks.abs().amax(1, keepdim=True) / 127 / 2 * (1 + 2**-16)
    assert (errors.abs() <= bound).all()
    assert (errors.abs().amax(1, keepdim=True) > 0.9 * bound).any(), "a bound that nothing comes near proves nothing"


def test_minmax_uint8_error_is_within_half_a_step():
    """Catches a grid that is clamped on one side only.

    step = range / 255. Rounding to the grid, or clamping at its lower end, costs step/2 (and 255 * 2^-23 steps for the range's
    own roundings); s, x * s, scale and code * scale round once each, which costs 4 * 2^-24 |x|.
    """
    tensor = torch.cat([normal(50 * 512, torch.float32, seed=3), 10 + normal(50 * 512, torch.float32, seed=4) * 1e-2])
    plan = plan_of("minmax_uint8", tensor)
    decoded = torch.empty_like(tensor)
    operations.decode(plan, encoded(plan, tensor), decoded)
    blocks, errors = tensor.double().reshape(-1, 512), (decoded.double() - tensor.double()).reshape(-1, 512)
    spread = blocks.amax(1, keepdim=True) - blocks.amin(1, keepdim=True)
    step = torch.maximum(spread, blocks.abs().amax(1, keepdim=True) * 2**-14) / 255
    assert (errors.abs() <= step * (0.5 + 2**-14) + blocks.abs() * 2**-21.9).all()


@pytest.mark.parametrize("codec", [codec for codec in CODECS if codec != "sign"])
def test_zero_stays_zero(codec):
    """Catches a grid without a zero: optimizers that divide by sqrt(v) turn noise on a zero gradient into a full step."""
    tensor = normal(2048, torch.float32, seed=1)
    tensor[::3] = 0.0
    tensor[512:1024] += 7 * (tensor[512:1024] != 0)  # minimum and maximum far from symmetric
    plan = plan_of(codec, tensor)
    decoded = torch.empty_like(tensor)
    operations.decode(plan, encoded(plan, tensor), decoded)
    assert (decoded[::3] == 0).all()


def test_sign_keeps_groups_of_zeros_and_means_over_the_others():
    """Catches embedding rows never seen that drift, and a scale that the zeros of other rows make small."""
    tensor = torch.zeros(1200)
    tensor[64:96] = 3.0
    tensor[70] = -3.0
    tensor[1024:1200:7] = 1.0
    plan = plan_of("sign", tensor)
    decoded = torch.empty_like(tensor)
    operations.decode(plan, encoded(plan, tensor), decoded)
    assert_same_bits(decoded[:1024], tensor[:1024])
    assert (decoded[1024:] == tensor[1024:].mean()).all()


@pytest.mark.parametrize("codec", [codec for codec in CODECS if codec != "none"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_error_feedback_is_as_specified(codec, dtype, instruction_set):
    """Catches residuals that are lost, doubled, in the wrong place, or poisoned for good by one NaN."""
    for number, tensor in enumerate(samples(dtype)):
        numel = tensor.numel()
        before = normal(numel + 3, torch.float32, seed=number)
        values, lost = reference.with_feedback(tensor.to(torch.float32), before[3:], codec)
        plan = Plan(codec, dtype, [0], [numel], residual_offsets=[3])
        for updated in (before.clone(), torch.full_like(before, 9.0)):
            old = updated if updated[:3].equal(before[:3]) else before  # in place, then elsewhere
            wire = torch.full((plan.wire_bytes,), FILLING, dtype=torch.uint8)
            operations.encode(plan, tensor, wire, Residuals(old, updated))
            decoded = torch.full_like(tensor, 3.0)
            operations.decode(plan, wire, decoded)
            assert_same_bits(decoded, reference.canonical(values.to(dtype)), f"sample {number}")
            assert_same_bits(updated[3:], lost, f"residuals of sample {number}")


@pytest.mark.parametrize("codec", ["int8", "int4", "sign"])
def test_error_feedback_of_a_sum_is_as_specified(codec, instruction_set):
    """Catches a residual that is added before the division."""
    tensors = [normal(3000, torch.float32, seed=seed) for seed in range(3)]
    plan = plan_of(codec, tensors[0])
    residual = normal(3000, torch.float32, seed=7)
    quantised = [reference.quantise(tensor, codec) for tensor in tensors]
    values, lost = reference.with_feedback((quantised[0] + quantised[1] + quantised[2]) / 3, residual, codec)
    messages = torch.cat([encoded(plan, tensor) for tensor in tensors])
    wire = torch.empty(plan.wire_bytes, dtype=torch.uint8)
    operations.decode_sum_encode(
        plan,
        messages,
        wire,
        count=3,
        stride_bytes=plan.wire_bytes,
        divisor=3,
        residuals=Residuals(residual, residual),
    )
    decoded = torch.empty(3000)
    operations.decode(plan, wire, decoded)
    assert_same_bits(decoded, values)
    assert_same_bits(residual, lost)


@pytest.mark.parametrize("codec", ["int4", "sign"])
def test_error_feedback_sends_everything_in_the_end(codec):
    """Catches feedback with the wrong sign: the sum of what was sent is that of the values, but for the last residual."""
    tensor = normal(2048, torch.float32, seed=5) * 1e-3
    plan = plan_of(codec, tensor)
    residual, sent, decoded = torch.zeros(2048), torch.zeros(2048, dtype=torch.float64), torch.empty(2048)
    for _ in range(100):
        wire = torch.empty(plan.wire_bytes, dtype=torch.uint8)
        operations.encode(plan, tensor, wire, Residuals(residual, residual))
        operations.decode(plan, wire, decoded)
        sent += decoded
    assert torch.allclose(sent + residual, 100 * tensor.double(), rtol=1e-4, atol=1e-6 * tensor.abs().max().item())
    assert residual.abs().mean() < tensor.abs().max(), "residuals must stay bounded"


def test_residuals_that_do_not_fit_are_refused():
    plan = Plan("sign", torch.float32, [0], [512], residual_offsets=[100])
    assert plan.residual_numel == 612
    tensor, wire = torch.zeros(512), torch.empty(plan.wire_bytes, dtype=torch.uint8)
    for bad in (torch.zeros(611), torch.zeros(612, dtype=torch.float64), torch.zeros(1224)[::2]):
        with pytest.raises(ValueError, match="residuals"):
            operations.encode(plan, tensor, wire, Residuals(torch.zeros(612), bad))
    lossless = Plan("none", torch.float32, [0], [512])
    with pytest.raises(ValueError, match="loses nothing"):
        operations.encode(lossless, tensor, torch.empty(2048, dtype=torch.uint8), Residuals(tensor, tensor))
    with pytest.raises(ValueError, match="loses something"):
        uses_feedback("none", True)
    with pytest.raises(ValueError, match="error_feedback must be True, False or None: got 2"):
        uses_feedback("int8", 2)
    assert [uses_feedback(codec, None) for codec in ("int8", "int4", "sign", "none")] == [False, True, True, False]


@pytest.mark.parametrize(("codec", "shared"), [("int8", 512), ("minmax_uint8", 512), ("int4", 128), ("sign", 512)])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_poison_spreads_to_its_block_and_no_further(codec, shared, value):
    """Catches a maximum that skips NaN, which would train on; and one that poisons all of a parameter."""
    for place in (0, 511, 512, 1023, 1024, 1099):
        tensor = normal(1100, torch.float32, seed=1)
        tensor[place] = value
        plan = plan_of(codec, tensor)
        decoded = torch.empty_like(tensor)
        operations.decode(plan, encoded(plan, tensor), decoded)
        block = place // shared
        assert decoded[block * shared : (block + 1) * shared].isnan().all()
        assert decoded.isnan().sum() == min(shared, 1100 - block * shared)


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nothing_outside_of_the_plan_is_written(codec, dtype):
    """Catches vector stores past a segment's end: into padding, a neighbour's elements, or memory that is not ours."""
    offsets, numels = [700, 3, 1300], [513, 600, 0]
    tensor = normal(1400, dtype, seed=2)
    sizes = [Plan(codec, dtype, [0], [numel]).wire_bytes for numel in numels]
    wire_offsets = [16, 16 + sizes[0] + 48, 16 + sizes[0] + 48 + sizes[1] + 160]
    plan = Plan(codec, dtype, offsets, numels, wire_offsets)
    assert plan.wire_offsets == wire_offsets
    assert plan.wire_bytes == wire_offsets[-1]
    assert plan.tensor_numel == 1303 - 3

    first, second = (
        torch.zeros(plan.wire_bytes + 64, dtype=torch.uint8),
        torch.full((plan.wire_bytes + 64,), 255, dtype=torch.uint8),
    )
    operations.encode(plan, tensor, first)
    operations.encode(plan, tensor, second)
    kept = (first == 0) & (second == 255)
    header_bytes, of_numel = {"int8": (4, 512), "minmax_uint8": (8, 512), "int4": (4, 128), "sign": (6, 512)}.get(codec, (0, 512))
    code_bits = {"fp16": 16, "bf16": 16, "int8": 8, "minmax_uint8": 8, "int4": 4, "sign": 1}.get(codec, 8 * dtype.itemsize)
    written = sum(-(-numel // of_numel) * header_bytes + -(-numel * code_bits // 8) for numel in numels)
    assert kept.sum() == first.numel() - written
    assert ((first == second) | kept).all()

    decoded = torch.full_like(tensor, -77.0)
    operations.decode(plan, first, decoded)
    for offset, numel in zip(offsets, numels, strict=True):
        assert_same_bits(decoded[offset : offset + numel], specified(codec, tensor[offset : offset + numel]))
        decoded[offset : offset + numel] = -77.0
    assert (decoded == -77.0).all()


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tensors_need_no_alignment(codec, dtype, instruction_set):
    """Catches aligned vector loads: a parameter may start at any element of a bucket."""
    tensor = normal(3000, dtype, seed=4)
    for start in range(1, 8):
        part = tensor[start:]
        plan = plan_of(codec, part)
        assert_same_bits(encoded(plan, part), encoded(plan, part.clone()))
        buffer = torch.zeros_like(tensor)
        operations.decode(plan, encoded(plan, part), buffer[start:])
        assert_same_bits(buffer[start:], specified(codec, part))


@pytest.mark.parametrize(
    ("codec", "expected"),
    [
        ("none", 4 * 1000),
        ("fp16", 2 * 1000),
        ("bf16", 2 * 1000),
        ("int8", 16 + 1008),
        ("minmax_uint8", 16 + 1008),
        ("int4", 32 + 512),
        ("sign", 16 + 128),
    ],
)
def test_wire_size_is_as_documented(codec, expected):
    """Catches a format that grew: 1000 elements are 2 blocks; headers and codes are padded to 16 bytes each."""
    assert Plan(codec, torch.float32, [0], [1000]).wire_bytes == expected
    assert Plan(codec, torch.float32, [0], [0]).wire_bytes == 0
    assert Plan(codec, torch.float32, [], []).wire_bytes == 0


def test_kernels_may_run_on_several_threads():
    """Catches a shared buffer inside of the kernels: two queues encode at once."""
    tensors = [normal(50_000, torch.float32, seed=seed) for seed in range(4)]
    plans = [plan_of("int8", tensor) for tensor in tensors]
    expected = [encoded(plan, tensor) for plan, tensor in zip(plans, tensors, strict=True)]
    different = []

    def work(k: int) -> None:
        for _ in range(50):
            if not torch.equal(encoded(plans[k], tensors[k]), expected[k]):
                different.append(k)

    threads = [threading.Thread(target=work, args=(k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not different


def test_names_of_codecs_and_dtypes_are_checked():
    """Catches a name that reaches the native side as a number of something else."""
    with pytest.raises(ValueError, match="codec must be one of none, fp16, bf16, int8, minmax_uint8, int4, sign: got 'int7'"):
        Plan("int7", torch.float32, [0], [1])
    with pytest.raises(ValueError, match=r"got torch\.int32"):
        Plan("int8", torch.int32, [0], [1])
    with pytest.raises(ValueError, match=r"got torch\.complex64"):
        Plan("int8", torch.complex64, [0], [1])


@pytest.mark.parametrize(
    ("offsets", "numels", "wire_offsets", "message"),
    [
        ([0], [-1], None, "segment 0 must not be negative: got offset 0, size -1"),
        ([-4], [1], None, "segment 0 must not be negative: got offset -4, size 1"),
        ([0, 5], [1], None, "as many offsets as sizes: got 2 tensor offsets, 1 sizes"),
        ([0], [1], [8], "segment 0 must start on the wire at a multiple of 16 bytes"),
        ([0, 100], [100, 100], [0, 16], "segment 1 must start .* behind the segment before it, which ends at 128: got 16"),
    ],
)
def test_impossible_plans_are_refused(offsets, numels, wire_offsets, message):
    """Catches plans that would make a kernel write outside of its memory, or two segments into one place."""
    with pytest.raises(ValueError, match=message):
        Plan("int8", torch.float32, offsets, numels, wire_offsets)


def test_tensors_and_messages_that_do_not_fit_are_refused():
    """Catches each check that is missing: without it the kernel reads or writes memory that is not the tensor's."""
    plan = Plan("int8", torch.float32, [100], [1000])
    tensor, wire = torch.zeros(1100), torch.zeros(plan.wire_bytes, dtype=torch.uint8)
    wrong = [
        (torch.zeros(1100, dtype=torch.float64), wire, "tensor must be one-dimensional, contiguous, torch.float32"),
        (torch.zeros(2, 600), wire, "tensor must be one-dimensional"),
        (torch.zeros(2200)[::2], wire, r"strides \(2,\)"),
        (torch.zeros(1099), wire, "needs a tensor of at least 1100 elements, got 1099"),
        (tensor, wire[:-1], "message of at least"),
        (tensor, torch.zeros(plan.wire_bytes, dtype=torch.int8), "a message must be .* uint8"),
        (tensor, torch.zeros(plan.wire_bytes * 2, dtype=torch.uint8)[::2], "a message must be"),
        (tensor, torch.zeros(plan.wire_bytes + 1, dtype=torch.uint8)[1:], "must lie at a multiple of 16 bytes"),
        (tensor, wire.to("meta"), "one CPU or CUDA device: got cpu and meta"),
        (tensor.to("meta"), wire.to("meta"), "one CPU or CUDA device: got meta and meta"),
    ]
    for bad_tensor, bad_wire, message in wrong:
        with pytest.raises(ValueError, match=message):
            operations.encode(plan, bad_tensor, bad_wire)
        with pytest.raises(ValueError, match=message):
            operations.decode(plan, bad_wire, bad_tensor)
        with pytest.raises(ValueError, match=message.replace("tensor must", "accumulator must")):
            operations.decode_accumulate(plan, bad_wire, bad_tensor)


def test_sums_that_do_not_fit_are_refused():
    """Catches a message that is read past its end: one too many, or strides that overlap."""
    plan = Plan("int8", torch.float32, [0], [1000])
    n = plan.wire_bytes
    wire, messages = torch.zeros(n, dtype=torch.uint8), torch.zeros(3 * n, dtype=torch.uint8)
    for count, stride_bytes, message in [
        (0, n, "at least one message"),
        (3, n + 16, "last message of at least"),
        (2, n - 16, "at least 1024"),
        (2, n + 1, "a multiple of 16 bytes apart"),
        (4, n, "last message of at least"),
    ]:
        with pytest.raises(ValueError, match=message):
            operations.decode_sum_encode(plan, messages, wire, count=count, stride_bytes=stride_bytes, divisor=1)
    with pytest.raises(ValueError, match="messages must be one-dimensional, contiguous"):
        operations.decode_sum_encode(plan, messages.float(), wire, count=1, stride_bytes=n, divisor=1)


def test_unknown_instruction_set_is_refused():
    """Catches a silent fallback to another one than asked for."""
    with pytest.raises(ValueError, match="instruction set 'avx1024'"):
        _native.use_instruction_set("avx1024")
    assert _native.instruction_set() == _native.instruction_sets()[-1]


def test_a_sample_holds_what_it_says():
    """Catches helper tensors that lost their trouble on the way: then the tests above would prove nothing."""
    for dtype in DTYPES:
        tensor = awkward(dtype)
        assert tensor.isnan().any()
        assert (tensor == float("inf")).any()
        assert (tensor == -float("inf")).any()
        assert ((tensor == 0) & (bits(tensor) != 0)).any(), "negative zero"
        assert len(bits(tensor)[tensor.isnan()].unique()) > 1, "NaN with a payload"
