"""Compares the codecs' CPU kernels, on one thread, with memcpy and with the same arithmetic in torch operations.

    python benchmarks/bench_codecs.py

Bytes moved are bytes read plus bytes written, for memcpy too. An operation and memcpy run in turn, and the operation's speed is
given as a ratio to memcpy's. Operations that mostly read can exceed 1, because memory is read faster than it is written.
"""

from __future__ import annotations

import ctypes
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from _common import Bar, Ratio, alternate, parser, save, show, show_bars

from lightning_accel.compression.codecs import CODECS
from lightning_accel.compression.operations import decode, decode_accumulate, decode_sum_encode, encode
from lightning_accel.compression.plan import Plan
from lightning_accel.native import BLOCK_NUMEL

_MEMCPY_BYTES = 256 << 20
_NUM_MESSAGES = 2  # summed by decode_sum_encode


@dataclass(frozen=True)
class Operation:
    """An operation of a codec on a dtype, ready to run, and the bytes it reads and writes."""

    codec: str
    dtype: torch.dtype
    name: str
    moved_bytes: int
    run: Callable[[], object]


def operations(codec: str, values: torch.Tensor) -> list[Operation]:
    """Returns the four operations of a codec on a tensor; they share its memory."""
    numel, dtype = values.numel(), values.dtype
    plan = Plan(codec, dtype, [0], [numel])
    stride_bytes = -(-plan.wire_bytes // 16) * 16
    messages = torch.zeros(_NUM_MESSAGES * stride_bytes, dtype=torch.uint8)
    for start in range(0, len(messages), stride_bytes):
        encode(plan, values, messages[start : start + stride_bytes])
    wire = torch.zeros(plan.wire_bytes, dtype=torch.uint8)
    decoded = torch.zeros(numel, dtype=dtype)
    accumulator = torch.zeros(numel, dtype=plan.value_dtype)
    tensor_bytes, wire_bytes, sum_bytes = numel * dtype.itemsize, plan.wire_bytes, accumulator.nbytes

    def sum_messages() -> None:
        decode_sum_encode(plan, messages, wire, count=_NUM_MESSAGES, stride_bytes=stride_bytes, divisor=_NUM_MESSAGES)

    return [
        Operation(codec, dtype, "encode", tensor_bytes + wire_bytes, lambda: encode(plan, values, wire)),
        Operation(codec, dtype, "decode", wire_bytes + tensor_bytes, lambda: decode(plan, messages, decoded)),
        Operation(
            codec,
            dtype,
            "decode_accumulate",
            wire_bytes + 2 * sum_bytes,
            lambda: decode_accumulate(plan, messages, accumulator),
        ),
        Operation(codec, dtype, "decode_sum_encode", (_NUM_MESSAGES + 1) * wire_bytes, sum_messages),
    ]


class Int8InTorch:
    """The arithmetic of `int8` in plain torch operations: the same codes, scales and sums."""

    def __init__(self, numel: int) -> None:
        self.codes = torch.zeros(numel // BLOCK_NUMEL, BLOCK_NUMEL, dtype=torch.int8)
        self.scales = torch.zeros(len(self.codes), 1)

    def encode(self, values: torch.Tensor) -> None:
        blocks = values.view(self.codes.shape).float()
        absmax = blocks.abs().amax(1, keepdim=True)
        self.scales = absmax / 127
        inverse = torch.where(absmax < 2.0**-100, 0.0, torch.tensor(127.0) / absmax)  # `127 / absmax` would round twice
        self.codes = (blocks * inverse).round().to(torch.int8)

    def decode_accumulate(self, accumulator: torch.Tensor) -> None:
        accumulator.view(self.codes.shape).add_(self.codes.float() * self.scales)


def seconds(run: Callable[[], object]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def memcpy_run() -> Callable[[], object]:
    source = torch.ones(_MEMCPY_BYTES, dtype=torch.uint8)
    target = torch.ones(_MEMCPY_BYTES, dtype=torch.uint8)

    def run(keep: tuple[torch.Tensor, torch.Tensor] = (source, target)) -> None:
        ctypes.memmove(keep[1].data_ptr(), keep[0].data_ptr(), _MEMCPY_BYTES)

    return run


def against_memcpy(operation: Operation, memcpy: Callable[[], object], pairs: int) -> tuple[Ratio, float]:
    """Returns the ratio of bytes moved per second to memcpy's, and the operation's GB/s."""
    operation.run()
    timed = alternate(lambda: seconds(operation.run), lambda: seconds(memcpy), pairs)
    share = operation.moved_bytes / (2 * _MEMCPY_BYTES)
    speed = statistics.median(operation.moved_bytes / own / 1e9 for own, _ in timed)
    return Ratio.of([share * other / own for own, other in timed]), speed


def against_torch(operation: Operation, run: Callable[[], object], pairs: int) -> Ratio:
    """Returns the speedup over torch operations."""
    run()
    return Ratio.of([other / own for own, other in alternate(lambda: seconds(operation.run), lambda: seconds(run), pairs)])


def check_same(values: torch.Tensor, in_torch: Int8InTorch) -> None:
    """Checks that the torch operations compute the same values as the kernels."""
    plan = Plan("int8", values.dtype, [0], [values.numel()])
    wire = torch.zeros(plan.wire_bytes, dtype=torch.uint8)
    encode(plan, values, wire)
    in_torch.encode(values)
    ours, theirs = torch.ones(values.numel()), torch.ones(values.numel())
    decode_accumulate(plan, wire, ours)
    in_torch.decode_accumulate(theirs)
    assert torch.equal(ours, theirs), "the torch operations do not compute what the kernels compute"


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--numel", type=int, default=64 << 20, help="elements of a tensor (default: 64 Mi)")
    arguments.add_argument("--pairs", type=int, default=20, help="pairs of runs per operation (default: %(default)s)")
    args = arguments.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)

    memcpy = memcpy_run()
    memcpy()
    memcpy_speed = statistics.median(2 * _MEMCPY_BYTES / seconds(memcpy) / 1e9 for _ in range(args.pairs))
    results: list[dict[str, object]] = []
    measured: dict[tuple[str, torch.dtype, str], Ratio] = {}
    dtypes = (torch.float32, torch.bfloat16)
    for dtype in dtypes:
        values = torch.randn(args.numel).to(dtype)
        for codec in CODECS:
            for operation in operations(codec, values):
                ratio, speed = against_memcpy(operation, memcpy, args.pairs)
                measured[codec, dtype, operation.name] = ratio
                results.append(
                    {
                        "codec": codec,
                        "dtype": _short(dtype),
                        "operation": operation.name,
                        "to_memcpy": ratio,
                        "gigabytes_per_second": speed,
                    }
                )

    values = torch.randn(args.numel)
    in_torch, accumulator = Int8InTorch(args.numel), torch.zeros(args.numel)
    check_same(values, in_torch)
    encode, _, decode_accumulate, _ = operations("int8", values)
    to_torch = {
        "encode": against_torch(encode, lambda: in_torch.encode(values), args.pairs),
        "decode_accumulate": against_torch(decode_accumulate, lambda: in_torch.decode_accumulate(accumulator), args.pairs),
    }

    names = ("encode", "decode", "decode_accumulate", "decode_sum_encode")
    show(
        f"{args.numel / 2**20:g} Mi elements, one thread: bytes moved per second, as a ratio to memcpy's {memcpy_speed:.1f} GB/s",
        ("codec, dtype", *names),
        [
            (f"{codec}, {_short(dtype)}", *(f"{measured[codec, dtype, name]:.2f}" for name in names))
            for dtype in dtypes
            for codec in CODECS
        ],
    )
    bars = [
        _bar("int8 encode moves at least 0.8 times memcpy's bytes/s", measured["int8", torch.float32, "encode"], 0.8),
        _bar("int8 decode_accumulate: at least 0.7 times", measured["int8", torch.float32, "decode_accumulate"], 0.7),
        *(_bar(f"int8 {name} is at least 15 times as fast as torch operations", to_torch[name], 15) for name in to_torch),
    ]
    show_bars(bars)
    save(args, {"memcpy_gigabytes_per_second": memcpy_speed, "to_memcpy": results, "int8_to_torch": to_torch}, bars)


def _bar(claim: str, ratio: Ratio, least: float) -> Bar:
    return Bar(claim, f"{ratio:.2f}", ratio.median >= least)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


if __name__ == "__main__":
    main()
