"""Comparing what ranks hold without sending it: what tensors there are, and which of them differ.

1. A layout says what tensors there are: names, dtypes, shapes. Ranks compare a digest of it, 24 bytes whatever the model; only
   where digests differ do they send the layouts, so that the error can say which tensor it is.
2. With equal layouts, ranks compare a digest of 8 bytes for each tensor's bits. What is equal everywhere need not be sent.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Mapping, Sequence
from functools import cache

import torch
from torch.nn.parameter import is_lazy

Gather = Callable[[bytes], Sequence[bytes]]
"""Sends a message to all ranks, and returns those of all ranks, in rank order; as many bytes on each rank. Collective."""

Layout = dict[str, str]
"""What tensors there are: for each name what must be the same on all ranks, such as dtype and shape, in words."""

IGNORE = (
    "name it, before the model is wrapped, in DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, [name])"
)
"""Remedy for a tensor that ranks cannot or need not have in common."""

_LANES = 1024
"""Numbers of 32 bits in a row, which one sum covers."""

_ROW_BYTES = 4 * _LANES

_CPU_SLICE_BYTES = 256 * _ROW_BYTES
"""How much is summed at once: little enough for the caches of a CPU."""

_GPU_SLICE_BYTES = 16_384 * _ROW_BYTES
"""The same on a GPU, which needs more to do at a time."""


def describe(tensor: torch.Tensor) -> str:
    """Says what must be the same on all ranks: dtype, shape, and the kind if it is not an ordinary dense tensor."""
    if is_lazy(tensor):
        return "not initialized"
    if tensor.is_nested:
        return f"a nested {tensor.dtype}"
    kind = "" if tensor.layout is torch.strided else f" ({str(tensor.layout).removeprefix('torch.')})"
    if tensor.is_conj() or tensor.is_neg():
        kind = " (conjugated or negated when it is read)"
    return f"{tensor.dtype}{kind} of shape {tuple(tensor.shape)}" + (" on the meta device" if tensor.is_meta else "")


def is_dense(tensor: torch.Tensor) -> bool:
    """Returns whether a tensor is an ordinary one, whose bits can be compared and sent."""
    is_strided = tensor.layout is torch.strided and not tensor.is_nested
    return is_strided and not tensor.is_quantized and not tensor.is_conj() and not tensor.is_neg()


def layout_digest(layout: Layout) -> bytes:
    """Returns 16 bytes that are equal for equal layouts, the order of names included, and no others."""
    return hashlib.blake2b(_text(layout), digest_size=16).digest()


def check_layouts(layout: Layout, gather: Gather, name: str) -> None:
    """Compares the ranks' layouts. Collective; sends 24 bytes to each rank where they are equal.

    Args:
        layout: This rank's layout.
        gather: Way to the other ranks.
        name: Name of the algorithm, for the message.

    Raises:
        ValueError: If they differ, with the tensor and the ranks; the same on all ranks.
    """
    text = _text(layout)
    messages = gather(layout_digest(layout) + len(text).to_bytes(8, "little"))
    if len(set(messages)) == 1:
        return
    longest = max(int.from_bytes(message[16:], "little") for message in messages)
    layouts = [dict(json.loads(other)) for other in gather(text.ljust(longest))]  # JSON may end with spaces
    raise ValueError(
        f"{name} needs the same parameters and buffers on all ranks: {_difference(layouts)}. Make them the same; or keep what "
        f"is each rank's own in an attribute that is no buffer, or {IGNORE}"
    )


def digests(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Returns int64 digests of the tensors' bits on the first one's device: equal for equal bits, on every device.

    Unequal bits have the same digest with probability 2^-64, if they differ in the lowest of 32 bits anywhere; 2^-33 if they
    differ in nothing but every second sign. The digest is multilinear hashing (Lemire and Kaser, arXiv:1202.4961): rows of 1024
    numbers of 32 bits are multiplied with fixed random numbers and summed modulo 2^64; then rows of the sums, until one is left.
    Sums of integers have the same bits in any order.

    Args:
        tensors: Dense tensors of any dtype and memory format; one without elements has the digest 0.
    """
    device = tensors[0].device
    small = [place for place, tensor in enumerate(tensors) if tensor.nbytes <= _ROW_BYTES]
    found = torch.empty(len(tensors), dtype=torch.int64, device=device)
    if small:  # all at once: a model may have thousands
        rows = torch.zeros(len(small), _ROW_BYTES, dtype=torch.uint8, device=device)
        pairs = [(row[: tensors[place].nbytes], tensors[place].detach()) for row, place in zip(rows, small, strict=True)]
        torch._foreach_copy_([row.view(tensor.dtype).view(tensor.shape) for row, tensor in pairs], [t for _, t in pairs])
        found[small] = _row_sums(rows.view(-1))
    for place in {*range(len(tensors))} - {*small}:
        sums = tensors[place].detach().contiguous().view(-1)
        while sums.numel() > 1:
            sums = _row_sums(sums.view(torch.uint8))
        found[place] = sums[0]
    return found


def differing(tensors: Mapping[str, torch.Tensor], gather: Gather) -> dict[str, torch.Tensor]:
    """Returns those of the tensors whose bits are not the same on all ranks. Collective; sends 8 bytes a tensor to each rank.

    Args:
        tensors: Dense tensors by name, with the same layout on all ranks.
        gather: Way to the other ranks.
    """
    if not tensors:
        return {}
    messages = gather(bytes(digests(list(tensors.values())).view(torch.uint8).tolist()))
    places = range(0, 8 * len(tensors), 8)
    pairs = zip(tensors.items(), places, strict=True)
    return {name: tensor for (name, tensor), k in pairs if len({message[k : k + 8] for message in messages}) > 1}


def _text(layout: Layout) -> bytes:
    return json.dumps(list(layout.items())).encode()


def _difference(layouts: Sequence[Layout]) -> str:
    """Says in words how layouts of the ranks differ, which are not all equal."""
    names = dict.fromkeys(name for layout in layouts for name in layout)
    unequal = [name for name in names if len({layout.get(name) for layout in layouts}) > 1]
    if not unequal:
        orders = [list(layout) for layout in layouts]
        place = next(place for place in range(len(names)) if len({order[place] for order in orders}) > 1)
        return f"the order differs, number {place} is {_by_rank([order[place] for order in orders])}"
    count = f" (one of {len(unequal)})" if len(unequal) > 1 else ""
    return f"{unequal[0]}{count} is {_by_rank([layout.get(unequal[0], 'missing') for layout in layouts])}"


def _by_rank(values: Sequence[str]) -> str:
    ranks: dict[str, list[int]] = {}
    for rank, value in enumerate(values):
        ranks.setdefault(value, []).append(rank)
    return ", ".join(f"{value} on {_ranks(who)}" for value, who in ranks.items())


def _ranks(ranks: Sequence[int]) -> str:
    shown = ", ".join(map(str, ranks[:8])) + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")
    return f"rank{'s' if len(ranks) > 1 else ''} {shown}"


def _row_sums(data: torch.Tensor) -> torch.Tensor:
    """Returns the sum of each row of bytes, int64; the last row is filled up with zeros."""
    keys = _keys(data.device)
    slices = torch.split(data, _CPU_SLICE_BYTES if data.device.type == "cpu" else _GPU_SLICE_BYTES)
    sums = torch.empty(-(-data.numel() // _ROW_BYTES), dtype=torch.int64, device=data.device)
    products = torch.empty(-(-slices[0].numel() // _ROW_BYTES), _LANES, dtype=torch.int64, device=data.device)
    for part, sums_of_part in zip(slices, torch.split(sums, len(products)), strict=True):
        if part.numel() % _ROW_BYTES or part.storage_offset() % 4:
            part = torch.nn.functional.pad(part, (0, -part.numel() % _ROW_BYTES))  # a copy, at the start of its memory
        lanes = part.view(torch.int32).view(-1, _LANES)
        torch.sum(torch.mul(lanes, keys, out=products[: len(lanes)]), 1, out=sums_of_part)
    return sums


@cache
def _keys(device: torch.device) -> torch.Tensor:
    source = random.Random(1024)  # the same numbers in every version of Python
    return torch.tensor([source.getrandbits(64) - 2**63 for _ in range(_LANES)], dtype=torch.int64, device=device)
