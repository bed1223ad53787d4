"""Without a GPU each module is one skip, not one for each of its thousands of cases, which take seconds to name."""

from pathlib import Path

import pytest
import torch


class WithoutGpu(pytest.Module):
    """A module that is imported, so that one that is broken fails everywhere, and then skipped."""

    def collect(self):
        assert self.obj is not None
        pytest.skip("no CUDA GPU", allow_module_level=True)


def pytest_pycollect_makemodule(module_path: Path, parent: pytest.Collector) -> pytest.Module | None:
    return None if torch.cuda.is_available() else WithoutGpu.from_parent(parent, path=module_path)
