"""Measures the CUDA kernels, as a share of the rate at which the same GPU copies memory in the same run.

    python benchmarks/bench_codecs_cuda.py --json benchmarks/results/codecs_cuda.json
    python benchmarks/bench_codecs_cuda.py --codecs int8 --sizes-mib 256 1024

An operation's bytes are those it must read and write once: tensor and message for encode and decode, message and twice the
accumulator for decode_accumulate, all messages and the result for decode_sum_encode; error feedback adds twice the residuals.
A copy's are twice the tensor's. QAdam's fold moves three operands, its step five, Adam's step seven. Each time is the median of
single calls, measured by CUDA events; calls are enqueued one after another, so that the GPU never waits for Python.

For int8's encode and QAdam's step, the same formula in torch operations, plain and under torch.compile, is measured too, with the
same bytes. At the end the program prints the number of kernels per bucket, and each claim beside its measured value.
"""

import argparse
import functools
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from lightning_accel import QAdam, _native
from lightning_accel.collectives.message_plan import TwoShotPlan, pieces_of
from lightning_accel.collectives.two_shot import compressed_all_reduce
from lightning_accel.compression import operations
from lightning_accel.compression.block_layout import Layout
from lightning_accel.compression.codecs import CODECS
from lightning_accel.compression.error_feedback import Feedback, Residuals
from lightning_accel.compression.plan import Plan
from lightning_accel.native import BLOCK_NUMEL, DTYPES, run_kernel
from lightning_accel.transport.group import Group
from lightning_accel.transport.scratch import Scratch

DEVICE = torch.device("cuda")
BENCHED_DTYPES = (torch.float32, torch.bfloat16)
NUM_MESSAGES = 8
NUM_PARAMETERS = 8  # in an optimizer: few, so that the GPU does not wait for Python
BUCKET_NUMELS = [2**18, 2**10, 3 * 2**18 + 5, 77] * 6  # 24 MiB of float32
WARM_UP_SECONDS = 0.1  # a GPU's clocks rise slowly
SMALLEST_MIB = 256  # smaller tensors would stay in a GPU's cache
MIB = 2**20
SUM = f"decode_sum_encode of {NUM_MESSAGES}"
COLUMNS = ("tensor", "codec", "operation", "ms", "GB/s", "share of copy")
LEAST_SHARES = (
    ("int8", "encode", 0.85),
    ("int8", "decode", 0.85),
    ("int8", SUM, 0.8),
    ("int8", "encode, error feedback", 0.8),
    ("qadam", "step", 0.85),
)
MOST_KERNELS = 3  # per bucket


def median_ms(call: Callable[[], object], num_calls: int) -> float:
    until = time.perf_counter() + WARM_UP_SECONDS
    while time.perf_counter() < until:
        call()
        torch.cuda.synchronize()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(2 * num_calls)]
    for start, end in zip(events[::2], events[1::2], strict=True):
        start.record()
        call()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in zip(events[::2], events[1::2], strict=True))


def torch_int8_encode(tensor: torch.Tensor, scales: torch.Tensor, codes: torch.Tensor) -> None:
    """Encodes int8 as codec_symmetric.h does, in torch operations; each row of `tensor` and `codes` is a block."""
    values = tensor.float()
    absmax = values.abs().amax(dim=1)  # NaN and Inf propagate
    is_poisoned = ~absmax.isfinite()
    is_blank = is_poisoned | (absmax < 2.0**-100)
    nan = torch.full_like(absmax, float("nan"))
    scales.copy_(torch.where(is_poisoned, nan, torch.where(is_blank, 0.0, absmax / 127.0)))
    inverse = (torch.full_like(absmax, 127.0) / absmax)[:, None]  # 127.0 / absmax is 127.0 * (1 / absmax) in torch
    codes.copy_(torch.where(is_blank[:, None], 0.0, (values * inverse).round()))


def torch_qadam_step(gradient: torch.Tensor, momentum: torch.Tensor, variance: torch.Tensor, parameter: torch.Tensor) -> None:
    """Runs qadam.h's step in torch operations, without its guard against gradients that are not finite."""
    momentum.copy_(gradient)
    parameter.sub_(1e-3 * (momentum / (variance.sqrt() / 0.5 + 1e-8)))


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
        tensor = torch.randn(size_mib * MIB // dtype.itemsize, device=DEVICE).to(dtype)
        target = torch.empty_like(tensor)
        self.run(name, "", "copy_", 2 * tensor.nbytes, lambda: target.copy_(tensor))
        try:
            self.run_qadam(name, tensor)
        except torch.OutOfMemoryError:
            self.results.append({"tensor": name, "codec": "qadam", "operation": "", "error": "not enough GPU memory"})
        torch.cuda.empty_cache()
        for codec in codec_names:
            try:
                self.run_codec(name, codec, tensor, target)
            except torch.OutOfMemoryError:
                self.results.append({"tensor": name, "codec": codec, "operation": "", "error": "not enough GPU memory"})
            torch.cuda.empty_cache()

    def run_codec(self, name: str, codec: str, tensor: torch.Tensor, target: torch.Tensor) -> None:
        plan = Plan(codec, tensor.dtype, [0], [tensor.numel()])
        wire = torch.empty(plan.wire_bytes, dtype=torch.uint8, device=DEVICE)
        self.run(name, codec, "encode", tensor.nbytes + wire.nbytes, lambda: operations.encode(plan, tensor, wire))
        if codec == "int8":
            self.run_torch_int8(name, tensor, wire)
        residuals = None
        if codec != "none":  # "none" loses nothing
            memory = torch.zeros(tensor.numel(), device=DEVICE)
            residuals = Residuals(memory, memory)
            num_bytes = tensor.nbytes + wire.nbytes + 2 * memory.nbytes
            call = functools.partial(operations.encode, plan, tensor, wire, residuals)
            self.run(name, codec, "encode, error feedback", num_bytes, call)
        self.run(name, codec, "decode", tensor.nbytes + wire.nbytes, lambda: operations.decode(plan, wire, target))

        sums = torch.zeros(tensor.numel(), dtype=plan.value_dtype, device=DEVICE)
        num_bytes = wire.nbytes + 2 * sums.nbytes
        self.run(name, codec, "decode_accumulate", num_bytes, lambda: operations.decode_accumulate(plan, wire, sums))

        messages = wire.repeat(NUM_MESSAGES)
        options = {"count": NUM_MESSAGES, "stride_bytes": plan.wire_bytes, "divisor": float(NUM_MESSAGES)}
        num_bytes = messages.nbytes + wire.nbytes
        call = functools.partial(operations.decode_sum_encode, plan, messages, wire, **options)
        self.run(name, codec, SUM, num_bytes, call)
        if residuals is not None:
            num_bytes += 2 * residuals.old.nbytes
            self.run(name, codec, f"{SUM}, error feedback", num_bytes, functools.partial(call, residuals=residuals))

    def run_torch_int8(self, name: str, tensor: torch.Tensor, wire: torch.Tensor) -> None:
        rows = tensor.view(-1, BLOCK_NUMEL)
        by_torch = torch.zeros_like(wire)
        scales = by_torch[: 4 * len(rows)].view(torch.float32)
        codes = by_torch[-tensor.numel() :].view(torch.int8).view(rows.shape)

        def differing_bytes() -> int:
            count = int((by_torch != wire).sum())
            by_torch.zero_()
            return count

        function = functools.partial(torch_int8_encode, rows, scales, codes)
        self.run_in_torch(name, "int8", "encode", tensor.nbytes + wire.nbytes, function, differing_bytes)

    def run_in_torch(
        self,
        name: str,
        codec: str,
        operation: str,
        num_bytes: int,
        function: Callable[[], None],
        differing_bytes: Callable[[], int] = lambda: 0,
    ) -> None:
        """Measures a function, plain and under torch.compile."""
        for label, version in (
            ("in torch operations", function),
            ("under torch.compile", torch.compile(function, dynamic=False)),
        ):
            try:
                version()
            except Exception as error:  # torch.compile needs a compiler, whose errors are of any type
                reason = type(error).__name__
                self.results.append({"tensor": name, "codec": codec, "operation": f"{operation} {label}", "error": reason})
                continue
            self.run(name, codec, f"{operation} {label}", num_bytes, version)
            self.results[-1]["differing_bytes"] = differing_bytes()

    def run_qadam(self, name: str, tensor: torch.Tensor) -> None:
        """Measures QAdam's passes and Adam's step, on parameters that together are as large as `tensor`."""

        def parameters() -> list[torch.nn.Parameter]:
            parts = [torch.nn.Parameter(part.clone()) for part in tensor.chunk(NUM_PARAMETERS)]
            for parameter in parts:
                parameter.grad = parameter.detach() * 1e-3
            return parts

        own = parameters()
        optimizer = QAdam(own, warmup_steps=10**9)
        optimizer.attach()
        optimizer.step()
        optimizer.freeze()
        dtype = DTYPES.index(tensor.dtype)
        folds = [
            (p.grad.data_ptr(), optimizer.state[p]["exp_avg"].data_ptr(), p.data_ptr(), p.numel())
            for p in own
            if p.grad is not None
        ]
        fold = functools.partial(run_kernel, _native.qadam_fold, DEVICE, dtype, folds, 0.9, 0.0, 1)
        self.run(name, "qadam", "fold", 3 * tensor.nbytes, fold)

        def step() -> None:
            optimizer.note_folded(own)  # the algorithm does so in backward
            optimizer.step()

        self.run(name, "qadam", "step", 5 * tensor.nbytes, step)
        operands = [torch.rand_like(tensor) for _ in range(4)]
        self.run_in_torch(name, "qadam", "step", 5 * tensor.nbytes, functools.partial(torch_qadam_step, *operands))
        for options in ({"fused": True}, {"fused": True, "capturable": True}):
            adam = torch.optim.Adam(parameters(), **options)
            label = ", ".join(f"{option}=True" for option in options)
            self.run(name, "qadam", f"Adam({label}).step", 7 * tensor.nbytes, adam.step)


def kernels_of_bucket(*, feedback: bool) -> list[str]:
    """Lists the kernels that run for a bucket in an int8 all_reduce, without copies, which stand for messages here."""
    layout = Layout(BUCKET_NUMELS, num_owners=1)
    places = [(i, sum(BUCKET_NUMELS[:i])) for i in range(len(BUCKET_NUMELS))]
    plan = TwoShotPlan.build("int8", torch.float32, pieces_of(layout, places), 1, 0, scatter=True)
    bucket, worker, server = torch.randn(3, layout.numel, device=DEVICE).unbind()
    residuals = Feedback(Residuals(worker, worker), Residuals(server, server)) if feedback else None
    scratch, alone = Scratch(), Group(None)

    def all_reduce() -> None:
        compressed_all_reduce(bucket, plan, alone, scratch, divisor=1.0, feedback=residuals)
        torch.cuda.synchronize()

    for _ in range(2):  # the first call allocates, copies the plans to the GPU, and starts the profiler
        with torch.profiler.profile() as profile:
            all_reduce()
    on_gpu = [event.name for event in profile.events() or [] if event.device_type == torch.autograd.DeviceType.CUDA]
    return [name for name in on_gpu if not name.startswith(("Memcpy", "Memset"))]


def bars(results: list[dict], kernels: dict[str, list[str]]) -> list[dict]:
    """Compares claims with results; a claim that was not measured does not hold."""
    found: list[tuple[str, str, bool]] = []

    def result_of(tensor: str, codec: str, operation: str) -> dict:
        return next((r for r in results if (r["tensor"], r["codec"], r["operation"]) == (tensor, codec, operation)), {})

    for tensor in dict.fromkeys(result["tensor"] for result in results):
        for codec, operation, least in LEAST_SHARES:
            share = result_of(tensor, codec, operation).get("share_of_copy", 0.0)
            found.append((f"{tensor}: {codec} {operation} {least} times a copy's rate or more", f"{share:.2f}", share >= least))
        own, adam = result_of(tensor, "qadam", "step"), result_of(tensor, "qadam", "Adam(fused=True).step")
        ratio = own["ms"] / adam["ms"] if "ms" in own and "ms" in adam else float("inf")
        found.append((f"{tensor}: qadam step takes no longer than Adam(fused=True)", f"{ratio:.2f}", ratio <= 1))
    for what, names in kernels.items():
        # No kernel means that the profiler has seen nothing.
        found.append((f"{what}: at most {MOST_KERNELS} kernels", str(len(names)), 0 < len(names) <= MOST_KERNELS))
    return [{"claim": claim, "measured": measured, "holds": holds} for claim, measured, holds in found]


def driver_version() -> str | None:
    """Returns the version of the GPU's driver, or None if nvidia-smi does not tell it."""
    try:
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return None


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
    Console(width=None if sys.stdout.isatty() else 130).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--codecs", nargs="+", choices=CODECS, default=list(CODECS))
    parser.add_argument("--sizes-mib", nargs="+", type=int, default=[SMALLEST_MIB], help="tensor sizes in MiB, at least 256")
    parser.add_argument("--calls", type=int, default=30, help="timed calls of each operation, at least 20")
    parser.add_argument("--json", type=Path, help="file for all numbers")
    arguments = parser.parse_args()
    if arguments.calls < 20:
        parser.error(f"--calls must be at least 20: got {arguments.calls}")
    if min(arguments.sizes_mib) < SMALLEST_MIB:
        parser.error(f"--sizes-mib must be at least {SMALLEST_MIB}, or caches serve it: got {min(arguments.sizes_mib)}")
    if not torch.cuda.is_available():
        sys.exit("this benchmark needs a CUDA GPU, but torch finds none")

    torch.manual_seed(0)
    bench = Bench(arguments.calls)
    for dtype in BENCHED_DTYPES:
        for size_mib in arguments.sizes_mib:
            bench.run_tensor(dtype, size_mib, arguments.codecs)

    gpu = torch.cuda.get_device_properties(torch.cuda.current_device())
    print_table(f"CUDA kernels on {gpu.name}: median of {arguments.calls} calls", bench.results)
    kernels = {f"a bucket{what}": kernels_of_bucket(feedback=bool(what)) for what in ("", " with error feedback")}
    claims = bars(bench.results, kernels)
    for bar in claims:
        print(f"{'holds ' if bar['holds'] else 'missed'}  {bar['measured']:>5}  {bar['claim']}")
    if arguments.json:
        report = {
            "gpu": gpu.name,
            "compute_capability": f"{gpu.major}.{gpu.minor}",
            "multiprocessors": gpu.multi_processor_count,
            "torch": torch.__version__,
            "cuda": torch.version.cuda,
            "driver": driver_version(),
            "calls": arguments.calls,
            "results": bench.results,
            "kernels": kernels,
            "bars": claims,
        }
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
