"""What log lines begin with."""

import logging

import pytest
import torch.distributed as dist

from lightning_accel.logs import get_log


def test_log_lines_name_the_package_and_the_rank(caplog: pytest.LogCaptureFixture) -> None:
    """Catches lines that nobody can place among those of other packages and ranks, and a prefix that comes twice."""
    for _ in range(2):  # as two modules, or an import after a reload
        log = get_log("lightning_accel.tests")
    log.warning("of %d ranks, 100 %s", 3, "%")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        log.warning("joined")
    finally:
        dist.destroy_process_group()
    assert caplog.messages == ["lightning-accel: of 3 ranks, 100 %", "lightning-accel, rank 0: joined"]
    assert {record.levelno for record in caplog.records} == {logging.WARNING}
