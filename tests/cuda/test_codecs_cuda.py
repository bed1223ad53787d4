"""The CUDA codecs write what the CPU codecs write, byte for byte.

Outputs are filled beforehand, differently on the two sides: a byte that should have been written and was not differs, and a byte
of padding, or outside the segments, or behind the end, that was written is no longer what it was.
"""

import pytest
import torch

from lightning_accel.compression import operations
from lightning_accel.compression.codecs import CODECS
from lightning_accel.compression.error_feedback import Residuals
from lightning_accel.compression.plan import Plan

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU"),
]

DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
SIZES = (0, 1, 7, 31, 511, 512, 513, 1023, 4096, 99_991)
OFFSETS = (0, 1, 2, 3, 4, 8)  # elements: aligned to 16 bytes, to a vector of some width, to an element only
BLOCK = 512
GUARD = 64  # elements or bytes behind the end of each buffer
CPU_FILL, CUDA_FILL = 0x00, 0xAB


def bits(numel, dtype, generator):
    """Every pattern: NaNs of both signs with payloads, infinities, subnormals."""
    data = torch.randint(0, 256, (numel * dtype.itemsize,), dtype=torch.uint8, generator=generator)
    return data.view(dtype)


def normal(numel, dtype, generator):
    return torch.randn(numel, dtype=torch.float64, generator=generator).to(dtype)


def sprinkled(*specials):
    def values(numel, dtype, generator):
        x = normal(numel, dtype, generator)
        for i in range(0, numel, 700):  # some blocks hold one, some none
            x[i + int(torch.randint(0, min(700, numel - i), (), generator=generator))] = specials[i // 700 % len(specials)]
        return x

    return values


def mixed_scales(numel, dtype, generator):
    exponents = torch.randint(-12, 4, ((numel + 99) // 100,), generator=generator).repeat_interleave(100)[:numel]
    return (torch.randn(numel, dtype=torch.float64, generator=generator) * 10.0**exponents).to(dtype)


def subnormal(numel, dtype, generator):
    return (torch.randn(numel, dtype=torch.float64, generator=generator) * torch.finfo(dtype).tiny / 4).to(dtype)


def around_the_smallest_scale(numel, dtype, generator):
    """Blocks whose largest value lies just below and just above 2^-100, where blocks become blocks of zeros."""
    scale = 2.0**-100 * (1 + torch.arange(numel) // BLOCK % 3 * 0.5 - 0.5)
    return ((torch.rand(numel, dtype=torch.float64, generator=generator) * 2 - 1) * scale).to(dtype)


def huge(numel, dtype, generator):
    return ((torch.rand(numel, dtype=torch.float64, generator=generator) * 2 - 1) * torch.finfo(dtype).max).to(dtype)


VALUES = {
    "normal": normal,
    "mixed_scales": mixed_scales,
    "zeros": lambda numel, dtype, _: torch.zeros(numel, dtype=dtype),
    "negative_zeros": lambda numel, dtype, _: -torch.zeros(numel, dtype=dtype),
    "few_nonzero": lambda numel, dtype, g: normal(numel, dtype, g) * (torch.rand(numel, generator=g) < 0.01),
    "subnormal": subnormal,
    "around_the_smallest_scale": around_the_smallest_scale,
    "constant": lambda numel, dtype, _: torch.full((numel,), -0.1, dtype=dtype),
    "tiny_range": lambda numel, dtype, g: (1000 + 1e-4 * normal(numel, torch.float64, g)).to(dtype),
    "one_sided": lambda numel, dtype, g: normal(numel, dtype, g).abs(),
    "huge": huge,
    "nan": sprinkled(float("nan")),
    "infinite": sprinkled(float("inf"), float("-inf")),
    "bits": bits,
}


class Case:
    """A plan, and what belongs to it on both sides."""

    def __init__(self, codec, dtype, tensor_offsets, numels, wire_offsets=None, *, values=normal, seed=0, device="cuda"):
        self.plan = Plan(codec, dtype, tensor_offsets, numels, wire_offsets)
        self.tensor_offsets, self.numels = tensor_offsets, numels
        self.values = values
        self.device = device
        self.generator = torch.Generator().manual_seed(seed)

        self.is_element = torch.zeros(self.plan.tensor_numel + GUARD, dtype=torch.bool)
        for offset, numel in zip(tensor_offsets, numels, strict=True):
            self.is_element[offset : offset + numel] = True

        code_bits = {"none": 8 * dtype.itemsize, "fp16": 16, "bf16": 16, "int4": 4, "sign": 1}.get(codec, 8)
        header_bytes = {"int8": 4, "minmax_uint8": 8, "int4": 4, "sign": 6}.get(codec, 0)
        scale_numel = 128 if codec == "int4" else BLOCK
        self.is_wire = torch.zeros(self.plan.wire_bytes + GUARD, dtype=torch.bool)
        for start, numel in zip(self.plan.wire_offsets, numels, strict=True):
            headers = -(-numel // scale_numel) * header_bytes
            codes = start + -(-headers // 16) * 16
            self.is_wire[start : start + headers] = True
            self.is_wire[codes : codes + -(-numel * code_bits // 8)] = True

    def with_residuals(self, shift):
        """The plan with residuals that lie `shift` elements behind the tensor's, and which elements they are."""
        offsets = [offset + shift for offset in self.tensor_offsets]
        plan = Plan(self.plan.codec, self.plan.dtype, self.tensor_offsets, self.numels, self.plan.wire_offsets, offsets)
        is_residual = torch.cat([torch.zeros(shift, dtype=torch.bool), self.is_element])
        return plan, is_residual[: plan.residual_numel + GUARD]

    def tensor(self):
        """A new tensor of values, on the CPU."""
        return self.values(self.plan.tensor_numel, self.plan.dtype, self.generator)

    def message(self):
        """A new message, on the CPU, as the CPU encodes it."""
        wire = torch.zeros(self.plan.wire_bytes, dtype=torch.uint8)
        operations.encode(self.plan, self.tensor(), wire)
        return wire

    def wires(self):
        """Filled room for a message, on the CPU and on the GPU."""
        numel = self.plan.wire_bytes + GUARD
        return filled(numel, torch.uint8, "cpu", CPU_FILL), filled(numel, torch.uint8, self.device, CUDA_FILL)

    def check_wires(self, cpu, cuda):
        check(cpu, cuda, self.is_wire)

    def tensors(self):
        """Filled room for a tensor, on the CPU and on the GPU."""
        numel = self.plan.tensor_numel + GUARD
        return filled(numel, self.plan.dtype, "cpu", CPU_FILL), filled(numel, self.plan.dtype, self.device, CUDA_FILL)

    def check_tensors(self, cpu, cuda):
        check(cpu, cuda, self.is_element.repeat_interleave(cpu.dtype.itemsize))


def filled(numel, dtype, device, byte):
    return torch.full((numel * dtype.itemsize,), byte, dtype=torch.uint8, device=device).view(dtype)


def check(cpu, cuda, is_written):
    cpu, cuda = cpu.view(torch.uint8), cuda.cpu().view(torch.uint8)
    wrong = ((cpu != cuda) & is_written).nonzero().flatten()
    assert not len(wrong), f"{len(wrong)} of {int(is_written.sum())} bytes differ, the first at {int(wrong[0])}"
    touched = ((cuda != CUDA_FILL) & ~is_written).nonzero().flatten()
    assert not len(touched), f"{len(touched)} bytes outside were written, the first at {int(touched[0])}"


def check_encode(case):
    tensor = case.tensor()
    cpu, cuda = case.wires()
    operations.encode(case.plan, tensor, cpu)
    operations.encode(case.plan, tensor.to(case.device), cuda)
    case.check_wires(cpu, cuda)


def check_decode(case):
    wire = case.message()
    cpu, cuda = case.tensors()
    operations.decode(case.plan, wire, cpu)
    operations.decode(case.plan, wire.to(case.device), cuda)
    case.check_tensors(cpu, cuda)


def check_decode_accumulate(case):
    wire = case.message()
    # Finite: of two NaNs, and of Inf - Inf, the IEEE standard leaves the sum's bits open.
    cpu = normal(case.plan.tensor_numel + GUARD, case.plan.value_dtype, case.generator)
    cuda = cpu.clone()
    cuda.view(torch.uint8).view(-1, cpu.dtype.itemsize)[~case.is_element] = CUDA_FILL
    cuda = cuda.to(case.device)
    operations.decode_accumulate(case.plan, wire, cpu)
    operations.decode_accumulate(case.plan, wire.to(case.device), cuda)
    case.check_tensors(cpu, cuda)


def messages_of(case, count):
    """That many messages, on the CPU, and how many bytes apart they are."""
    stride_bytes = case.plan.wire_bytes + 32
    messages = torch.zeros(count * stride_bytes, dtype=torch.uint8)
    for k in range(count):
        messages[k * stride_bytes :][: case.plan.wire_bytes] = case.message()
    return messages, stride_bytes


def check_decode_sum_encode(case, counts=(1, 2, 3, 8)):
    messages, stride_bytes = messages_of(case, max(counts))
    for count in counts:
        for divisor in {float(count), 3.0, 0.5}:  # a power of two takes another way than the others
            cpu, cuda = case.wires()
            options = {"count": count, "stride_bytes": stride_bytes, "divisor": divisor}
            operations.decode_sum_encode(case.plan, messages, cpu, **options)
            operations.decode_sum_encode(case.plan, messages.to(case.device), cuda, **options)
            case.check_wires(cpu, cuda)
        # In the place of the last message, as two ranks do.
        last = (count - 1) * stride_bytes
        on_cpu, on_cuda = messages.clone(), messages.to(case.device)
        for copy in (on_cpu, on_cuda):
            operations.decode_sum_encode(case.plan, copy, copy[last:], count=count, stride_bytes=stride_bytes, divisor=2.0)
        assert torch.equal(on_cpu, on_cuda.cpu())


def check_feedback(case, operation):
    """operation(plan, wire, residuals) on both sides; residuals aligned like the tensor and not, in place and apart."""
    if case.plan.codec == "none":
        pytest.skip("codec none loses nothing: it takes no residuals")
    for shift in (0, 1):
        plan, is_residual = case.with_residuals(shift)
        numel = len(is_residual)
        old = normal(numel, torch.float32, case.generator)
        for in_place in (False, True):
            cpu, cuda = case.wires()
            on_cpu, on_cuda = old.clone(), old.to(case.device)
            cpu_updated = on_cpu if in_place else filled(numel, torch.float32, "cpu", CPU_FILL)
            cuda_updated = on_cuda if in_place else filled(numel, torch.float32, case.device, CUDA_FILL)
            operation(plan, cpu, Residuals(on_cpu, cpu_updated))
            operation(plan, cuda, Residuals(on_cuda, cuda_updated))
            case.check_wires(cpu, cuda)
            if in_place:
                assert torch.equal(cpu_updated.view(torch.int32), cuda_updated.cpu().view(torch.int32))
            else:
                check(cpu_updated, cuda_updated, is_residual.repeat_interleave(4))


def check_encode_with_feedback(case):
    tensor = case.tensor()
    check_feedback(case, lambda plan, wire, residuals: operations.encode(plan, tensor.to(wire.device), wire, residuals))


def check_decode_sum_encode_with_feedback(case):
    messages, stride_bytes = messages_of(case, 3)
    options = {"count": 3, "stride_bytes": stride_bytes, "divisor": 3.0}

    def operation(plan, wire, residuals):
        operations.decode_sum_encode(plan, messages.to(wire.device), wire, residuals=residuals, **options)

    check_feedback(case, operation)


all_operations = pytest.mark.parametrize(
    "operation",
    [
        check_encode,
        check_decode,
        check_decode_accumulate,
        check_decode_sum_encode,
        check_encode_with_feedback,
        check_decode_sum_encode_with_feedback,
    ],
    ids=lambda check: check.__name__.removeprefix("check_"),
)
all_codecs = pytest.mark.parametrize("codec", CODECS)
all_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))


@all_operations
@all_codecs
@all_dtypes
@pytest.mark.parametrize("numel", SIZES)
def test_sizes(operation, codec, dtype, numel):
    """Catches wrong guards at ragged ends and vector access where a tensor is not aligned for it."""
    for offset in OFFSETS if numel < 10_000 else (0, 1):
        operation(Case(codec, dtype, [offset], [numel], seed=numel))


@all_operations
@all_codecs
@all_dtypes
@pytest.mark.parametrize("values", VALUES.values(), ids=VALUES)
def test_values(operation, codec, dtype, values):
    """Catches contraction, flushed subnormals, approximate division, a NaN that is not the canonical one."""
    for offset in (0, 1):
        operation(Case(codec, dtype, [offset], [9 * BLOCK + 13], values=values))


@all_operations
@all_codecs
@all_dtypes
@pytest.mark.parametrize("seed", range(4))
def test_segments(operation, codec, dtype, seed):
    """Segments of all sizes, empty ones among them, with gaps, and in another order in the tensor than on the wire."""
    generator = torch.Generator().manual_seed(seed)

    def random(high):
        return int(torch.randint(0, high, (), generator=generator))

    numels = [(0, 0, 1, 7, 31, 511, 512, 513, 1023, 4096, 5000)[random(11)] for _ in range(24)]
    wire_offsets, wire_offset = [], 0
    for numel in numels:
        wire_offsets.append(wire_offset)
        wire_offset += Plan(codec, dtype, [0], [numel]).wire_bytes + 16 * random(3)
    tensor_offsets, offset = [0] * len(numels), random(4)
    for i in torch.randperm(len(numels), generator=generator).tolist():
        tensor_offsets[i] = offset
        offset += numels[i] + random(3)
    operation(Case(codec, dtype, tensor_offsets, numels, wire_offsets, values=mixed_scales, seed=seed))


@all_operations
@all_codecs
@pytest.mark.parametrize("num_segments", [2, 31, 32, 33, 1024, 1025, 5000])
def test_many_segments(operation, codec, num_segments):
    """Catches a search for a block's segment that is wrong at some number of segments, or among empty ones."""
    generator = torch.Generator().manual_seed(num_segments)
    numels = torch.randint(0, 4, (num_segments,), generator=generator)
    numels[torch.rand(num_segments, generator=generator) < 0.02] = 1300
    numels[-1] = 0
    tensor_offsets = (numels.cumsum(0) - numels).tolist()
    operation(Case(codec, torch.float32, tensor_offsets, numels.tolist()))


@all_operations
@all_codecs
@pytest.mark.parametrize("numels", [[], [0], [0, 0, 0]], ids=str)
def test_empty_plans(operation, codec, numels):
    """Nothing is launched and nothing written: a grid of no thread blocks would be an error."""
    operation(Case(codec, torch.float32, [5] * len(numels), numels))


@all_codecs
def test_more_blocks_than_warps(codec):
    """Each warp works on many blocks: catches a stride that leaves some out."""
    check_encode(Case(codec, torch.bfloat16, [0], [70_000 * BLOCK + 77], values=bits))


@all_codecs
def test_current_stream(codec):
    """The kernels run behind what the current stream was given before, and nothing else orders them."""
    case = Case(codec, torch.float32, [0], [1_000_003])
    tensor = case.tensor()
    cpu, cuda = case.wires()
    operations.encode(case.plan, tensor, cpu)
    source = tensor.pin_memory()
    late = torch.zeros_like(tensor, device="cuda")
    operations.encode(case.plan, late, cuda)  # a plan's table goes to the GPU at its first use, and that waits
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        late.copy_(source, non_blocking=True)
        operations.encode(case.plan, late, cuda)
    stream.synchronize()
    case.check_wires(cpu, cuda)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@all_operations
def test_other_device(operation):
    """Catches a launch on the current GPU where the tensors lie on another."""
    assert torch.cuda.current_device() == 0
    operation(Case("int8", torch.float32, [1], [5000], device="cuda:1"))


@all_codecs
def test_graph_capture(codec):
    """A graph can hold the operations: they allocate nothing and wait for nothing."""
    case = Case(codec, torch.float32, [1], [70_001])
    plan, stride_bytes = case.plan, -(-case.plan.wire_bytes // 16) * 16
    tensor = case.tensor().cuda()
    messages = torch.zeros(2 * stride_bytes, dtype=torch.uint8, device="cuda")
    mean = torch.zeros(stride_bytes, dtype=torch.uint8, device="cuda")
    decoded = torch.zeros_like(tensor)

    def exchange():
        for message in messages.split(stride_bytes):
            operations.encode(plan, tensor, message)
        operations.decode_sum_encode(plan, messages, mean, count=2, stride_bytes=stride_bytes, divisor=2.0)
        operations.decode(plan, mean, decoded)

    exchange()  # the plan's table goes to the GPU at its first use
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        exchange()
    tensor.copy_(case.tensor())
    graph.replay()
    from_graph = decoded.clone()
    exchange()
    assert torch.equal(from_graph.view(torch.uint8), decoded.view(torch.uint8))


def test_more_than_32_bits():
    """More than 2^31 elements in a tensor and bytes in a message: catches an index that is too small.

    The tensor repeats a pattern of whole blocks whose length divides no power of two, so that the CPU has to code the pattern
    only.
    """
    period = 1001 * BLOCK
    numel = 2**31 + 3 * BLOCK + 5
    periods, rest = divmod(numel, period)
    plan, pattern_plan, rest_plan = (Plan("int8", torch.float16, [0], [n]) for n in (numel, period, rest))
    assert plan.wire_bytes > 2**31
    needed_bytes = 2 * numel + 3 * plan.wire_bytes + 2**30
    if torch.cuda.mem_get_info()[0] < needed_bytes:
        pytest.skip(f"needs {needed_bytes / 2**30:.0f} GiB of GPU memory")

    def repeated(pattern, tail):
        """The parts of a large buffer that repeat `pattern` and end in `tail`, as compared or copied piece by piece."""
        return lambda large: [
            (large[: periods * len(pattern)].view(periods, -1), pattern.cuda().expand(periods, -1)),
            (large[periods * len(pattern) :][: len(tail)], tail.cuda()),
        ]

    def check_message(wire, pattern_wire, rest_wire):
        headers, pattern_headers, rest_headers = (4 * -(-n // BLOCK) for n in (numel, period, rest))
        codes, pattern_codes, rest_codes = (-(-n // 16) * 16 for n in (headers, pattern_headers, rest_headers))
        parts = repeated(pattern_wire[:pattern_headers], rest_wire[:rest_headers])(wire[:headers])
        parts += repeated(pattern_wire[pattern_codes:][:period], rest_wire[rest_codes:][:rest])(wire[codes:][:numel])
        for actual, expected in parts:
            for actual_rows, expected_rows in zip(actual.split(256), expected.split(256), strict=True):
                assert torch.equal(actual_rows, expected_rows)

    pattern = mixed_scales(period, torch.float16, torch.Generator().manual_seed(0))
    tensor = torch.empty(numel, dtype=torch.float16, device="cuda")
    for target, source in repeated(pattern, pattern[:rest])(tensor):
        target.copy_(source)

    stride_bytes = -(-plan.wire_bytes // 16) * 16
    messages = torch.full((2 * stride_bytes,), CUDA_FILL, dtype=torch.uint8, device="cuda")
    on_cpu = []
    for part_plan, part in ((pattern_plan, pattern), (rest_plan, pattern[:rest])):
        wire = torch.zeros(part_plan.wire_bytes, dtype=torch.uint8)
        operations.encode(part_plan, part, wire)
        on_cpu.append(wire)
    for message in messages.split(stride_bytes):
        operations.encode(plan, tensor, message)
        check_message(message, *on_cpu)

    mean = torch.full((stride_bytes,), CUDA_FILL, dtype=torch.uint8, device="cuda")
    operations.decode_sum_encode(plan, messages, mean, count=2, stride_bytes=stride_bytes, divisor=2.0)
    means_on_cpu = []
    for part_plan, wire in zip((pattern_plan, rest_plan), on_cpu, strict=True):
        means_on_cpu.append(torch.zeros_like(wire))
        options = {"count": 2, "stride_bytes": len(wire), "divisor": 2.0}
        operations.decode_sum_encode(part_plan, wire.repeat(2), means_on_cpu[-1], **options)
    check_message(mean, *means_on_cpu)

    tensor.view(torch.int16).fill_(-1)
    operations.decode(plan, mean, tensor)
    decoded = []
    for part_plan, wire, part in zip((pattern_plan, rest_plan), means_on_cpu, (pattern, pattern[:rest]), strict=True):
        decoded.append(torch.empty_like(part))
        operations.decode(part_plan, wire, decoded[-1])
    for actual, expected in repeated(*decoded)(tensor):
        for actual_rows, expected_rows in zip(actual.split(256), expected.split(256), strict=True):
            assert torch.equal(actual_rows.view(torch.int16), expected_rows.view(torch.int16))
