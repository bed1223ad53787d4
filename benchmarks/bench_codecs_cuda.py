"""How fast the CUDA codecs are, as a share of what the same GPU copies in the same run.

    python benchmarks/bench_codecs_cuda.py --json benchmarks/results/codecs_cuda.json
    python benchmarks/bench_codecs_cuda.py --codecs int8 --sizes-mib 256

An operation's bytes are those it must read and write once: tensor and message for encode and decode, message and twice the
accumulator for decode_accumulate, all messages and the result for decode_sum_encode; error feedback adds twice the residuals.
The copy's are twice the tensor's. Each time is the median of single calls, enqueued one behind another so that the GPU never
waits for Python, between CUDA events.

Beside int8's encode stands the same formula in torch operations, plain and under torch.compile, counted with the same bytes.
"""

import argparse
import functools
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from lightning_accel import codecs

DTYPES = (torch.float32, torch.bfloat16)
NUM_MESSAGES = 8
WARM_UP_CALLS = 5
MIB = 2**20
COLUMNS = ("tensor", "codec", "operation", "ms", "GB/s", "share of copy")


def median_ms(call: Callable[[], object], num_calls: int) -> float:
    for _ in range(WARM_UP_CALLS):
        call()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(2 * num_calls)]
    for start, end in zip(events[::2], events[1::2], strict=True):
        start.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in zip(events[::2], events[1::2], strict=True))


def torch_int8_encode(tensor: torch.Tensor, scales: torch.Tensor, codes: torch.Tensor) -> None:
    """int8 of codec_symmetric.h in torch operations; `tensor` and `codes` are rows of a block."""
    values = tensor.float()
    absmax = values.abs().amax(dim=1)  # NaN and Inf come through
    is_poisoned = ~absmax.isfinite()
    is_blank = is_poisoned | (absmax < 2.0**-100)
    nan = torch.full_like(absmax, float("nan"))
    scales.copy_(torch.where(is_poisoned, nan, torch.where(is_blank, 0.0, absmax / 127.0)))
    inverse = (torch.full_like(absmax, 127.0) / absmax)[:, None]  # 127.0 / absmax is 127.0 * (1 / absmax) in torch
    codes.copy_(torch.where(is_blank[:, None], 0.0, (values * inverse).round()))


class Bench:
    def __init__(self, num_calls: int) -> None:
        self.num_calls = num_calls
        self.results: list[dict] = []

    def run(self, tensor: str, codec: str, operation: str, num_bytes: int, call: Callable[[], object]) -> None:
        result = {"tensor": tensor, "codec": codec, "operation": operation, "bytes": num_bytes}
        try:
            result["ms"] = median_ms(call, self.num_calls)
            result["gb_per_s"] = num_bytes / result["ms"] / 1e6
        except torch.OutOfMemoryError:
            result["error"] = "not enough GPU memory"
        if operation != "copy_" and "error" not in result:
            copies = [r for r in self.results if r["tensor"] == tensor and r["operation"] == "copy_" and "error" not in r]
            if copies:
                result["share_of_copy"] = result["gb_per_s"] / copies[0]["gb_per_s"]
        self.results.append(result)

    def run_tensor(self, dtype: torch.dtype, size_mib: int, codec_names: list[str]) -> None:
        name = f"{str(dtype).removeprefix('torch.')} {size_mib} MiB"
        tensor = torch.randn(size_mib * MIB // dtype.itemsize, device="cuda").to(dtype)
        target = torch.empty_like(tensor)
        self.run(name, "", "copy_", 2 * tensor.nbytes, lambda: target.copy_(tensor))
        for codec in codec_names:
            try:
                self.run_codec(name, codec, tensor, target)
            except torch.OutOfMemoryError:
                self.results.append({"tensor": name, "codec": codec, "operation": "", "error": "not enough GPU memory"})
            torch.cuda.empty_cache()

    def run_codec(self, name: str, codec: str, tensor: torch.Tensor, target: torch.Tensor) -> None:
        plan = codecs.Plan(codec, tensor.dtype, [0], [tensor.numel()])
        wire = torch.empty(plan.wire_bytes, dtype=torch.uint8, device="cuda")
        self.run(name, codec, "encode", tensor.nbytes + wire.nbytes, lambda: codecs.encode(plan, tensor, wire))
        if codec == "int8":
            self.run_torch_int8(name, tensor, wire)
        residuals = None
        if codec != "none":  # which loses nothing
            memory = torch.zeros(tensor.numel(), device="cuda")
            residuals = codecs.Residuals(memory, memory)
            num_bytes = tensor.nbytes + wire.nbytes + 2 * memory.nbytes
            call = functools.partial(codecs.encode, plan, tensor, wire, residuals)
            self.run(name, codec, "encode, error feedback", num_bytes, call)
        self.run(name, codec, "decode", tensor.nbytes + wire.nbytes, lambda: codecs.decode(plan, wire, target))

        sums = torch.zeros(tensor.numel(), dtype=plan.value_dtype, device="cuda")
        num_bytes = wire.nbytes + 2 * sums.nbytes
        self.run(name, codec, "decode_accumulate", num_bytes, lambda: codecs.decode_accumulate(plan, wire, sums))

        messages = wire.repeat(NUM_MESSAGES)
        options = {"count": NUM_MESSAGES, "stride_bytes": plan.wire_bytes, "divisor": float(NUM_MESSAGES)}
        operation, num_bytes = f"decode_sum_encode of {NUM_MESSAGES}", messages.nbytes + wire.nbytes
        call = functools.partial(codecs.decode_sum_encode, plan, messages, wire, **options)
        self.run(name, codec, operation, num_bytes, call)
        if residuals is not None:
            num_bytes += 2 * residuals.old.nbytes
            self.run(name, codec, f"{operation}, error feedback", num_bytes, functools.partial(call, residuals=residuals))

    def run_torch_int8(self, name: str, tensor: torch.Tensor, wire: torch.Tensor) -> None:
        rows = tensor.view(-1, codecs.BLOCK_NUMEL)
        by_torch = torch.zeros_like(wire)
        scales = by_torch[: 4 * len(rows)].view(torch.float32)
        codes = by_torch[-tensor.numel() :].view(torch.int8).view(rows.shape)
        for label, function in (
            ("encode in torch operations", torch_int8_encode),
            ("encode under torch.compile", torch.compile(torch_int8_encode, dynamic=False)),
        ):
            by_torch.zero_()
            try:
                function(rows, scales, codes)
            except Exception as error:  # torch.compile needs a compiler, and raises what that raises
                reason = type(error).__name__
                self.results.append({"tensor": name, "codec": "int8", "operation": label, "error": reason})
                continue
            self.run(name, "int8", label, tensor.nbytes + wire.nbytes, lambda function=function: function(rows, scales, codes))
            self.results[-1]["differing_bytes"] = int((by_torch != wire).sum())


def as_row(result: dict) -> tuple[str, ...]:
    if "error" in result:
        return (result["tensor"], result["codec"], result["operation"], "", "", result["error"])
    share = f"{100 * result['share_of_copy']:.0f} %" if "share_of_copy" in result else ""
    if result.get("differing_bytes"):
        share += f" ({result['differing_bytes']} bytes differ)"
    return (
        result["tensor"],
        result["codec"],
        result["operation"],
        f"{result['ms']:.3f}",
        f"{result['gb_per_s']:.0f}",
        share,
    )


def print_table(title: str, results: list[dict]) -> None:
    rows = [as_row(result) for result in results]
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        widths = [max(len(row[i]) for row in [COLUMNS, *rows]) for i in range(len(COLUMNS))]
        print(title)
        for row in [COLUMNS, *rows]:
            print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
        return
    table = Table(title=title)
    for i, column in enumerate(COLUMNS):
        table.add_column(column, justify="left" if i < 3 else "right", no_wrap=True)
    for row, result in zip(rows, results, strict=True):
        if result["operation"] == "copy_":
            table.add_section()
        table.add_row(*row)
    Console().print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--codecs", nargs="+", choices=codecs.CODECS, default=list(codecs.CODECS))
    parser.add_argument("--sizes-mib", nargs="+", type=int, default=[256, 1024], help="of the tensors")
    parser.add_argument("--calls", type=int, default=30, help="timed calls of each operation, at least 20")
    parser.add_argument("--json", type=Path, help="where to write all numbers")
    arguments = parser.parse_args()
    if arguments.calls < 20:
        parser.error(f"--calls must be at least 20: got {arguments.calls}")
    if not torch.cuda.is_available():
        sys.exit("this benchmark needs a CUDA GPU; torch finds none")

    torch.manual_seed(0)
    bench = Bench(arguments.calls)
    for dtype in DTYPES:
        for size_mib in arguments.sizes_mib:
            bench.run_tensor(dtype, size_mib, arguments.codecs)

    gpu = torch.cuda.get_device_properties(torch.cuda.current_device())
    print_table(f"CUDA codecs on {gpu.name}: median of {arguments.calls} calls", bench.results)
    if arguments.json:
        report = {
            "gpu": gpu.name,
            "compute_capability": f"{gpu.major}.{gpu.minor}",
            "multiprocessors": gpu.multi_processor_count,
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "calls": arguments.calls,
            "results": bench.results,
        }
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
