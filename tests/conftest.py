"""Seeds, and the police: a test that leaves a thread, a process, an environment variable or a process group behind fails."""

import contextlib
import multiprocessing
import multiprocessing.forkserver
import multiprocessing.resource_tracker
import os
import random
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from helpers.programs import reserved_port
from helpers.ranks import OTHERS_VARIABLES

PATIENCE_SECONDS = 2.0
"""How long what was ended may take to disappear."""

torch.set_num_threads(1)  # small tensors, and cores to share
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell lets what it starts in the background ignore Ctrl-C

POOLS = ("pydevd", "ThreadPoolExecutor", "asyncio", "QueueFeederThread")
"""Beginnings of the names of threads that libraries keep for good."""


@pytest.fixture(autouse=True)
def _seeds():
    random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _no_threads_left():
    before = set(threading.enumerate())
    yield
    left = _poll(lambda: [t.name for t in set(threading.enumerate()) - before if not t.name.startswith(POOLS)])
    assert not left, f"the test left threads: {left}"


@pytest.fixture(autouse=True)
def _no_processes_left():
    before = _children()
    yield
    left = _poll(lambda: _children() - before)
    assert not left, f"the test left child processes: {left}"
    assert not multiprocessing.active_children(), f"the test left ranks: {multiprocessing.active_children()}"


@pytest.fixture(autouse=True)
def _no_variables_left():
    before = dict(os.environ)
    yield
    after = dict(os.environ)
    changed = {key for key in before.keys() | after.keys() if before.get(key) != after.get(key)} - OTHERS_VARIABLES
    for key in changed:
        os.environ.pop(key, None)
        if key in before:
            os.environ[key] = before[key]
    assert not changed, f"the test changed environment variables: {sorted(changed)}"


@pytest.fixture(autouse=True)
def _no_process_group_left():
    yield
    left = dist.is_available() and dist.is_initialized()
    if left:
        dist.destroy_process_group()
    assert not left, "the test left the default process group"


@pytest.fixture
def port() -> Iterator[int]:
    """Where the ranks of a test's program may meet."""
    with reserved_port() as reserved:
        yield reserved


def _children() -> set[int]:
    """Processes that this one has started, but for multiprocessing's own servers."""
    servers = {multiprocessing.forkserver._forkserver._forkserver_pid, multiprocessing.resource_tracker._resource_tracker._pid}
    children = set()
    for task in Path("/proc/self/task").iterdir():
        with contextlib.suppress(OSError):  # a thread that has just ended, or a kernel without this file
            children |= {int(pid) for pid in (task / "children").read_text().split()}
    return children - servers


def _poll(find):
    """What is left after a moment's patience."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while (left := find()) and time.monotonic() < deadline:
        time.sleep(0.02)
    return left
