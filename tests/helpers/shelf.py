"""A remote file system for tests, and what lies in a folder of checkpoints."""

import re
from pathlib import Path

import fsspec
import torch.distributed as dist
from fsspec.implementations.local import LocalFileSystem


class Shelf(LocalFileSystem):
    """A file system at URLs, which all processes of this machine share: `shelf:///tmp/a.pt` is /tmp/a.pt.

    Like an object store it has no empty folders, and like s3fs it does not read what has changed since it last looked.
    """

    protocol = "shelf"

    def __init__(self, **options):
        super().__init__(**options)
        self._seen = {}

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(path.removeprefix("shelf://"))

    def _open(self, path, mode="rb", **options):
        if mode == "rb":
            changed = Path(path).stat().st_mtime_ns
            if self._seen.setdefault(path, changed) != changed:
                raise OSError(f"{path} has changed")
        return super()._open(path, mode, **options)

    def invalidate_cache(self, path=None):
        self._seen.clear()

    def rm(self, path, **options):
        super().rm(path, **options)
        for folder in Path(self._strip_protocol(path)).parents:
            if any(folder.iterdir()):
                break
            folder.rmdir()


fsspec.register_implementation("shelf", Shelf, clobber=True)


def listed(folder):
    """Names of all files below a folder, at rest; a folder of ranks' files without the random part of its name. Collective."""
    dist.barrier()
    names = sorted(str(found.relative_to(folder)) for found in Path(folder).rglob("*") if found.is_file())
    dist.barrier()
    return [re.sub(r"(step-\d+)-\w+", r"\1", name) for name in names]


def beside(path, steps, world_size=2):
    """Names of a checkpoint and its ranks' files, as `listed` gives them."""
    return [path, *(f"{path}.ranks/step-{steps}/rank-{rank}-of-{world_size}.pt" for rank in range(world_size))]
