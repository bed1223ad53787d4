"""Q(x): what is left of values after encoding and decoding, block by block.

Values are summed in float32 whatever the tensor's dtype, so Q maps float32 to float32; only codec `none` keeps float64. A
tensor is cut into blocks of 512 from its first element; its last block may be shorter.
"""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK_NUMEL = 512

SMALLEST_ABSMAX = 2.0**-100
"""A block whose largest magnitude is below this is a block of zeros."""

NAN = torch.tensor(float("nan"))
"""The one NaN there is; every other one, whatever its bits, becomes this."""


def value_dtype(codec: str, dtype: torch.dtype) -> torch.dtype:
    """What a tensor of `dtype` is computed in."""
    return torch.float64 if codec == "none" and dtype == torch.float64 else torch.float32


def canonical(values: Tensor) -> Tensor:
    """`values` with every NaN replaced by the canonical one."""
    return torch.where(values.isnan(), NAN.to(values.dtype), values)


def quantise(values: Tensor, codec: str) -> Tensor:
    """Q(values), one-dimensional, in `value_dtype`."""
    if codec == "none":
        return canonical(values)
    if codec == "fp16":
        return canonical(values.to(torch.float16).to(torch.float32))
    if codec == "bf16":
        return canonical(values.to(torch.bfloat16).to(torch.float32))
    whole = values.numel() // BLOCK_NUMEL * BLOCK_NUMEL
    full_blocks, short_block = values[:whole].view(-1, BLOCK_NUMEL), values[whole:].view(1, -1)
    parts = [_quantise_blocks(blocks, codec).flatten() for blocks in (full_blocks, short_block) if blocks.numel()]
    return torch.cat(parts) if parts else values


def _quantise_blocks(blocks: Tensor, codec: str) -> Tensor:
    """Q by rows, with the rules that both codecs share: one NaN or Inf poisons its block, and dust is zero."""
    absmax = blocks.abs().amax(1, keepdim=True)  # NaN where there is one
    results = _int8(blocks, absmax) if codec == "int8" else _minmax_uint8(blocks, absmax)
    results = torch.where(absmax < SMALLEST_ABSMAX, torch.zeros(()), results)
    return torch.where(absmax.isfinite(), results, NAN)


def _int8(blocks: Tensor, absmax: Tensor) -> Tensor:
    """Code = round(x * (127 / absmax)), x' = code * (absmax / 127); round is half to even."""
    codes = torch.round(blocks * (torch.tensor(127.0) / absmax)) + 0.0  # an integer has no negative zero
    return codes * (absmax / 127.0)


def _minmax_uint8(blocks: Tensor, absmax: Tensor) -> Tensor:
    """S = 255 / range, code = clamp(round(x * s), upper - 255, upper) for upper = round(max * s), x' = code * (range / 255).

    range = max(max - min, absmax * 2^-14), written with halves: max - min may exceed the largest float32.
    """
    high, low = blocks.amax(1, keepdim=True), blocks.amin(1, keepdim=True)
    half_range = torch.maximum(high * 0.5 - low * 0.5, absmax * 2.0**-15)
    levels_per_unit = torch.tensor(127.5) / half_range
    upper = torch.round(high * levels_per_unit)
    lower = upper - 255.0
    codes = torch.minimum(torch.maximum(torch.round(blocks * levels_per_unit), lower), upper) - lower  # 0..255, on the wire
    return (codes + lower) * (half_range / 127.5)
