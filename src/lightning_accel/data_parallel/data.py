"""A DataLoader for each rank's own part of a dataset."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch.utils.data import DataLoader, Dataset, DistributedSampler


class EpochSampler(DistributedSampler[Any]):
    """A DistributedSampler that begins a new epoch, with a new order, each time it is iterated."""

    def __iter__(self) -> Iterator[Any]:
        order = super().__iter__()
        self.epoch += 1
        return order


def get_dataloader(
    dataset: Dataset[Any], *, shuffle: bool = False, drop_last: bool = False, seed: int = 0, **options: Any
) -> DataLoader[Any]:
    """Makes a DataLoader that gives each rank its own part of a dataset, in a new order each epoch.

    Args:
        dataset: Dataset with a length.
        shuffle: Whether each epoch has an order of its own; `loader.sampler.set_epoch(k)` goes to epoch k, to resume.
        drop_last: Whether the tail that does not fill all ranks' last batches is left out; else samples are repeated.
        seed: Seed of the order; the same on all ranks.
        **options: Arguments of DataLoader, such as batch_size and num_workers.

    Raises:
        ValueError: For `sampler` or `batch_sampler`: this function makes the sampler.
        RuntimeError: Without a default process group.
    """
    for name in ("sampler", "batch_sampler"):
        if options.get(name) is not None:
            raise ValueError(f"get_dataloader makes the sampler: use DataLoader itself with a {name} of your own")
    sampler = EpochSampler(dataset, shuffle=shuffle, drop_last=drop_last, seed=seed)
    return DataLoader(dataset, sampler=sampler, drop_last=drop_last, **options)
