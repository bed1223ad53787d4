"""Bagua's contrib, as far as scripts use it: samplers that give all ranks batches of similar work."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch.nn import SyncBatchNorm
from torch.utils.data import Dataset, Sampler

__all__ = ["LoadBalancingDistributedBatchSampler", "LoadBalancingDistributedSampler", "SyncBatchNorm"]

_WITHOUT = {
    "fuse_optimizer": "torch's optimizers take fused=True or foreach=True: leave fuse_optimizer out, and fuse_step() is step()",
    "CacheLoader": "keep samples with the dataset: there is no cache in redis here",
    "CachedDataset": "keep samples with the dataset: there is no cache in redis here",
}


def __getattr__(name: str) -> Any:
    if name in _WITHOUT:
        raise ImportError(f"Bagua's contrib.{name} is not offered: {_WITHOUT[name]}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


class LoadBalancingDistributedSampler(Sampler[int]):
    """Gives all ranks samples of similar cost at the same time; for each seed the order is Bagua's.

    Samples are sorted by complexity and cut into chunks of one sample per rank; `shuffle` reorders the chunks in each epoch.

    Args:
        dataset: Dataset with a length; each sample is read once.
        complexity_fn: Function that returns a sample's complexity, such as its length.
        num_replicas: Number of ranks; None takes the default group's.
        rank: Rank of this process; None takes the default group's.
        shuffle: Whether each epoch has an order of its own; call `set_epoch` before it.
        seed: Seed of the order; the same on all ranks.
        drop_last: Whether the most complex samples, which do not fill a chunk, are left out; else the least complex are repeated.
        random_level: Noise added to complexities, as a fraction of their range: from 0, the best balance, to 1.

    Raises:
        ValueError: If the rank or random_level is out of range.
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        complexity_fn: Callable[..., int],
        num_replicas: int | None = None,
        rank: int | None = None,
        shuffle: bool = True,
        seed: int = 0,
        drop_last: bool = False,
        random_level: float = 0,
    ) -> None:
        self.num_replicas = dist.get_world_size() if num_replicas is None else num_replicas
        self.rank = dist.get_rank() if rank is None else rank
        if not 0 <= self.rank < self.num_replicas:
            raise ValueError(f"rank must be at least 0 and below num_replicas {self.num_replicas}: got {self.rank}")
        if not 0 <= random_level <= 1:
            raise ValueError(f"random_level must be from 0 to 1: got {random_level}")
        self.dataset = dataset
        self.shuffle = shuffle
        self.seed = seed
        self.drop_last = drop_last
        self.epoch = 0
        numel = len(dataset)  # type: ignore[arg-type]
        self._complexities = [complexity_fn(dataset[index]) for index in range(numel)]
        self._noise = int((max(self._complexities) - min(self._complexities)) * random_level + 1)
        self.num_samples = numel // self.num_replicas if drop_last else -(-numel // self.num_replicas)

    def chunks(self) -> list[list[int]]:
        """Returns this epoch's chunks of samples, each in rank order."""
        complexities = self._complexities
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        if self.shuffle:
            noise = torch.randint(self._noise, (len(complexities),), generator=generator, device="cpu").tolist()
            complexities = [complexity + more for complexity, more in zip(complexities, noise, strict=True)]
        order = sorted(range(len(complexities)), key=complexities.__getitem__)
        ranks = range(self.num_replicas)
        chunks = [[order[(k * len(ranks) + rank) % len(order)] for rank in ranks] for k in range(self.num_samples)]
        if not self.shuffle:
            return chunks
        return [chunks[k] for k in torch.randperm(len(chunks), generator=generator, device="cpu").tolist()]

    def __iter__(self) -> Iterator[int]:
        return iter([chunk[self.rank] for chunk in self.chunks()])

    def __len__(self) -> int:
        return self.num_samples

    def set_epoch(self, epoch: int) -> None:
        """Selects the order of an epoch."""
        self.epoch = epoch


class LoadBalancingDistributedBatchSampler(Sampler[list[int]]):
    """Gives batches of different sizes, equally many on all ranks.

    Args:
        sampler: Sampler of the samples; its drop_last must be False.
        batch_fn: Function that cuts a list of samples into batches; called with every rank's list, and the same on all ranks.
        drop_last: Whether all ranks end with the one that has the fewest batches; else ranks with fewer repeat theirs.

    Raises:
        ValueError: If the sampler is another one or has drop_last, or a rank has no batch.
    """

    def __init__(
        self,
        sampler: LoadBalancingDistributedSampler,
        batch_fn: Callable[[list[int]], list[list[int]]],
        drop_last: bool = False,
    ) -> None:
        if not isinstance(sampler, LoadBalancingDistributedSampler) or sampler.drop_last:
            raise ValueError("sampler must be a LoadBalancingDistributedSampler with drop_last=False")
        self.sampler = sampler
        self.batch_fn = batch_fn
        self.drop_last = drop_last
        self._batches = self._cut()

    def __iter__(self) -> Iterator[list[int]]:
        return iter(self._batches)

    def __len__(self) -> int:
        return len(self._batches)

    def set_epoch(self, epoch: int) -> None:
        """Selects the order of an epoch."""
        self.sampler.set_epoch(epoch)
        self._batches = self._cut()

    def _cut(self) -> list[list[int]]:
        chunks = self.sampler.chunks()
        by_rank = [self.batch_fn([chunk[rank] for chunk in chunks]) for rank in range(self.sampler.num_replicas)]
        counts = [len(batches) for batches in by_rank]
        if min(counts) == 0:
            raise ValueError(f"batch_fn must give every rank a batch: ranks got {counts}")
        own = by_rank[self.sampler.rank]
        return [own[k % len(own)] for k in range(min(counts) if self.drop_last else max(counts))]
