"""Q(x), which encodes and decodes values block by block.

Values are summed in float32 whatever the tensor's dtype, so Q maps float32 to float32; only codec `none` keeps float64. A
tensor is cut into blocks of 512 (`int4`: 128) from its first element; its last block may be shorter.
"""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK_NUMEL = 512

SMALLEST_ABSMAX = 2.0**-100
"""A block whose largest magnitude is below this is a block of zeros."""

NAN = torch.tensor(float("nan"))
"""The canonical NaN; every other one, whatever its bits, becomes this."""


def value_dtype(codec: str, dtype: torch.dtype) -> torch.dtype:
    """Returns the dtype in which tensors of `dtype` are computed."""
    return torch.float64 if codec == "none" and dtype == torch.float64 else torch.float32


def canonical(values: Tensor) -> Tensor:
    """Replaces every NaN by the canonical one."""
    return torch.where(values.isnan(), NAN.to(values.dtype), values)


def quantise(values: Tensor, codec: str) -> Tensor:
    """Returns Q(values), one-dimensional, in `value_dtype`."""
    if codec == "none":
        return canonical(values)
    if codec == "fp16":
        return canonical(values.to(torch.float16).to(torch.float32))
    if codec == "bf16":
        return canonical(values.to(torch.bfloat16).to(torch.float32))
    block_numel = 128 if codec == "int4" else BLOCK_NUMEL
    whole = values.numel() // block_numel * block_numel
    full_blocks, short_block = values[:whole].view(-1, block_numel), values[whole:].view(1, -1)
    parts = [_quantise_blocks(blocks, codec).flatten() for blocks in (full_blocks, short_block) if blocks.numel()]
    return torch.cat(parts) if parts else values


def with_feedback(values: Tensor, residuals: Tensor, codec: str) -> tuple[Tensor, Tensor]:
    """Returns Q(x + e) and the new e = x + e - Q(x + e), or the old e where that is not finite. One-dimensional, float32."""
    sums = values + residuals
    results = quantise(sums, codec)
    lost = sums - results
    return results, torch.where(lost.isfinite(), lost, residuals)


def _quantise_blocks(blocks: Tensor, codec: str) -> Tensor:
    """Applies Q to rows, with the rules these codecs share: a NaN or Inf makes its block NaN, and tiny blocks become zeros."""
    absmax = blocks.abs().amax(1, keepdim=True)  # NaN where there is one
    if codec == "sign":
        results, size = _sign(blocks)
    elif codec == "minmax_uint8":
        results, size = _minmax_uint8(blocks, absmax), absmax
    else:
        results, size = _symmetric(blocks, absmax, {"int8": 127.0, "int4": 7.0}[codec]), absmax
    results = torch.where(size < SMALLEST_ABSMAX, torch.zeros(()), results)
    return torch.where(absmax.isfinite(), results, NAN)


def _symmetric(blocks: Tensor, absmax: Tensor, largest: float) -> Tensor:
    """Computes code = round(x * (L / absmax)), x' = code * (absmax / L) for L = 127 or 7; halves round to even."""
    codes = torch.round(blocks * (torch.tensor(largest) / absmax)) + 0.0  # an integer has no negative zero
    return codes * (absmax / largest)


def _sign(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """Returns each element's sign times the mean magnitude of the groups of 32 that are not all zeros, and that mean.

    32 partial sums grow group by group, then are folded in halves: the same order on every machine. Terms are scaled by 2^-10.
    """
    rows, numel = blocks.shape
    groups = -(-numel // 32)
    padded = torch.zeros(rows, groups * 32)
    padded[:, :numel] = blocks
    by_group = padded.view(rows, groups, 32)
    is_live = (by_group != 0).any(2)
    sums = torch.zeros(rows, 32)
    for group in range(groups):
        sums = sums + by_group[:, group].abs() * 2.0**-10
    while sums.shape[1] > 1:
        half = sums.shape[1] // 2
        sums = sums[:, :half] + sums[:, half:]
    sizes = torch.full((groups,), 32)
    sizes[-1] = numel - 32 * (groups - 1)
    live_numel = (is_live * sizes).sum(1, keepdim=True).clamp(min=1).to(torch.float32)
    mean = sums / live_numel * 2.0**10
    signed = torch.where(blocks.signbit(), -mean, mean)
    return torch.where(is_live.repeat_interleave(32, 1)[:, :numel], signed, torch.zeros(())), mean


def _minmax_uint8(blocks: Tensor, absmax: Tensor) -> Tensor:
    """Computes s = 255 / range, code = clamp(round(x * s), up - 255, up) for up = round(max * s), x' = code * (range / 255).

    Here range = max(max - min, absmax * 2^-14), computed from halves because max - min may exceed the largest float32.
    """
    high, low = blocks.amax(1, keepdim=True), blocks.amin(1, keepdim=True)
    half_range = torch.maximum(high * 0.5 - low * 0.5, absmax * 2.0**-15)
    levels_per_unit = torch.tensor(127.5) / half_range
    upper = torch.round(high * levels_per_unit)
    lower = upper - 255.0
    codes = torch.minimum(torch.maximum(torch.round(blocks * levels_per_unit), lower), upper) - lower  # 0..255, on the wire
    return (codes + lower) * (half_range / 127.5)
