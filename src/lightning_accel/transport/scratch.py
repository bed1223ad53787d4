"""Memory that collectives keep from call to call."""

from __future__ import annotations

from collections.abc import Iterable

import torch


class Scratch:
    """Memory that grows to what was asked for and stays until `clear`.

    One collective at a time may use it, on a GPU one stream; one that was started and not waited for still does.
    """

    def __init__(self) -> None:
        self._memory: dict[tuple[str, torch.device], torch.Tensor] = {}

    def bytes(self, name: str, numel: int, device: torch.device) -> torch.Tensor:
        """Returns `numel` bytes called `name`, with whatever they held."""
        return self._get(name, numel, device, pinned=False)

    def pinned(self, name: str, numel: int) -> torch.Tensor:
        """Returns `numel` bytes of pinned host memory."""
        return self._get(f"pinned {name}", numel, torch.device("cpu"), pinned=True)

    def values(self, name: str, numel: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """Returns `numel` elements of `dtype`, with whatever they held."""
        return self.bytes(name, numel * dtype.itemsize, device).view(dtype)

    def clear(self, streams: Iterable[torch.cuda.Stream] = ()) -> None:
        """Gives everything back; the next use allocates anew. On a GPU, what runs in `streams` may end before."""
        for memory in self._memory.values():
            for stream in streams if memory.is_cuda else ():
                memory.record_stream(stream)
        self._memory.clear()

    @property
    def allocated_bytes(self) -> int:
        """Bytes held."""
        return sum(memory.numel() for memory in self._memory.values())

    def _get(self, name: str, numel: int, device: torch.device, *, pinned: bool) -> torch.Tensor:
        memory = self._memory.get((name, device))
        if memory is None or memory.numel() < numel:
            memory = torch.empty(numel, dtype=torch.uint8, device=device, pin_memory=pinned)
            self._memory[name, device] = memory
        return memory[:numel]
