"""Work under way and the failure that ends it, without ranks."""

import threading
import time

import pytest
import torch

from lightning_accel import CommunicationError
from lightning_accel.background.failure import PendingWork, WorkTracker


def tracker(limit_seconds: float = 30.0):
    failures = []
    return WorkTracker("test", "rank 1 of 4", limit_seconds, lambda: failures.append("failed")), failures


def pending(label: str = "bucket 3") -> PendingWork:
    return PendingWork(label, torch.ones(2))


def test_work_that_is_done_is_delivered_once():
    """Catches a future that is completed twice, which raises, or never, which hangs backward."""
    made, failures = tracker()
    work = pending()
    assert made.begin(work)
    assert not made.is_idle
    made.finish(work)
    made.finish(work)
    assert made.is_idle
    assert work.future.done()
    made.wait()
    made.check()
    assert failures == []


def test_the_first_failure_ends_everything_and_stays():
    """Catches work that goes on after a failure, a later error that hides the first, and groups that are closed twice."""
    made, failures = tracker()
    one, other = pending("bucket 0"), pending("bucket 1")
    made.begin(one)
    made.begin(other)
    made.fail(ValueError("the first"), "bucket 0")
    made.fail(TypeError("the second"), "bucket 1")
    assert one.future.done()
    assert other.future.done()
    assert failures == ["failed"]
    assert not made.begin(pending())
    assert not made.begin_detached("averaging")
    for _ in range(2):
        with pytest.raises(CommunicationError, match=r"test: bucket 0 failed on rank 1 of 4: ValueError: the first\.") as caught:
            made.check()
        assert type(caught.value.__cause__) is ValueError


def test_a_wait_without_progress_ends():
    """Catches a wait without a bound, and one that hides which work did not come."""
    made, _ = tracker(limit_seconds=0.1)
    made.begin(pending("bucket 7"))
    started = time.perf_counter()
    made.wait()
    assert time.perf_counter() - started < 10
    with pytest.raises(CommunicationError, match=r"bucket 7 failed .* TimeoutError: nothing came back"):
        made.check()


def test_a_wait_is_bounded_from_the_last_progress_on():
    """Catches a bound for the whole of a backward, which would end slow but living communication."""
    made, _ = tracker(limit_seconds=0.8)
    works = [pending(f"bucket {k}") for k in range(5)]
    for work in works:
        made.begin(work)

    def finish() -> None:
        for work in works:
            time.sleep(0.3)
            made.finish(work)

    thread = threading.Thread(target=finish)
    thread.start()
    made.wait()
    thread.join()
    made.check()


def test_join_waits_for_detached_work_only():
    """Catches a join that waits for buckets, and a wait that waits for what runs by itself."""
    made, _ = tracker(limit_seconds=0.1)
    assert made.begin_detached("averaging")
    made.wait()
    made.check()
    made.join("pause")
    with pytest.raises(CommunicationError, match=r"pause failed .* other ranks did not join"):
        made.check()


def test_nothing_begins_after_close_and_what_is_under_way_fails():
    """Catches a thread that is started by late work, and a close that leaves a future open."""
    made, _ = tracker()
    work = pending()
    made.begin(work)
    made.close()
    assert work.future.done()
    with pytest.raises(CommunicationError, match="communication was closed before it was done"):
        made.check()
    idle, _ = tracker()
    idle.close()
    idle.check()
    with pytest.raises(RuntimeError, match="late was started after communication was closed"):
        idle.begin(pending("late"))
