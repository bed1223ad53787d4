"""Runs a function on N ranks, each a process, within a time limit, and leaves no process behind.

Importing torch takes seconds, so ranks are forked from a server process that has imported everything once and started
nothing: multiprocessing's forkserver. They meet through a file in a directory of their own, never through a fixed port.
"""

import contextlib
import faulthandler
import gc
import importlib.util
import inspect
import io
import multiprocessing
import os
import pickle
import runpy
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Collection
from datetime import timedelta
from multiprocessing import connection
from pathlib import Path
from typing import Any
from unittest import mock

from helpers import programs

PRELOADED = ["torch", "torch._dynamo", "torch.nn.parallel", "torch.optim", "pytest", "sklearn.datasets"]
PRELOADED += ["lightning_accel.checkpoint.plain", "lightning_accel.launch.process_group", "lightning_accel.reference"]

OTHERS_VARIABLES = {"PYTEST_CURRENT_TEST", "PYTORCH_NVML_BASED_CUDA_CHECK", "TORCHINDUCTOR_CACHE_DIR", "CUDA_MODULE_LOADING"}
"""What pytest, Lightning and torch set in the environment."""

GRACE_SECONDS = 5.0
"""How long the other ranks may go on once one has failed, so that their errors are heard too."""


class RankError(Exception):
    """A rank raised; the message is its traceback."""


def run_ranks(
    fn: Callable[..., Any],
    world_size: int,
    *args: Any,
    timeout: float = 150.0,
    lost: Collection[int] = (),
    backend: str | None = "gloo",
) -> list[Any]:
    """Calls `fn(rank, world_size, *args)` on each rank, with a default process group, and gives what each returned.

    A rank fails if it raises, or if it leaves a thread of ours or a changed environment variable behind.

    Args:
        fn: a function at the top of a test module.
        world_size: number of ranks.
        args: the same for each, pickled.
        timeout: seconds until all ranks are killed.
        lost: ranks that `fn` kills or stops; nobody waits for them, and None is what they return.
        backend: of the process group; None leaves it to `fn` to make one.

    Raises:
        RankError: with the traceback of the rank that failed first.
        TimeoutError: if a rank neither returned nor raised in time.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    job = pickle.dumps((fn.__module__, inspect.getfile(fn), fn.__qualname__, backend, pickle.dumps(args)))
    processes, results, failures = [], [None] * world_size, []
    with tempfile.TemporaryDirectory() as folder:
        try:
            waiting = {}
            for rank in range(world_size):
                receiver, sender = context.Pipe(duplex=False)
                arguments = (sender, rank, world_size, str(Path(folder) / "store"), timeout, job)
                process = context.Process(target=_be_rank, args=arguments, daemon=True, name=f"rank {rank}")
                process.start()
                sender.close()
                processes.append(process)
                waiting[receiver] = rank
            deadline = time.monotonic() + timeout
            while set(waiting.values()) - set(lost):
                ready = connection.wait(list(waiting), max(deadline - time.monotonic(), 0))
                for receiver in ready:
                    rank = waiting.pop(receiver)
                    outcome, value = _receive(receiver)
                    if outcome == "returned":
                        results[rank] = value
                    elif outcome == "raised" or rank not in lost:
                        failures.append(f"rank {rank} of {world_size}: {value}")
                        deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
                if not ready and not failures:
                    raise TimeoutError(f"ranks {sorted(waiting.values())} were not done within {timeout} s")
                if not ready:
                    break
            # A rank that has answered ends by itself.
            for process in processes:
                if not failures and int(process.name.split()[1]) not in lost:
                    process.join(GRACE_SECONDS)
        finally:
            for process in processes:
                process.kill()
            for process in processes:
                process.join()
                process.close()
    if failures:
        raise RankError("\n".join(failures))
    return results


def run_script(path: Path, world_size: int, *words: object, folder: Path, launched: bool = True) -> list[str]:
    """Runs a script on each rank, and gives what each printed; forked, it need not import torch anew.

    Args:
        path: of the script.
        world_size: number of ranks.
        words: the script's arguments; "{rank}" in them is the rank's own.
        folder: where it runs.
        launched: whether there are a launcher's variables, as torchrun sets them.
    """
    with programs.reserved_port() as port:
        arguments = str(path), [str(word) for word in words], str(folder), port if launched else None
        return run_ranks(_be_script, world_size, *arguments, backend=None)


def own_threads() -> list[str]:
    """Names of the living threads that lightning_accel has started."""
    return [thread.name for thread in threading.enumerate() if "lightning_accel" in thread.name]


def _be_script(rank: int, world_size: int, path: str, words: list[str], folder: str, port: int | None) -> str:
    variables = {"LOCAL_RANK": rank, "RANK": rank, "LOCAL_WORLD_SIZE": world_size, "WORLD_SIZE": world_size, "GROUP_RANK": 0}
    variables |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    launched = {name: str(value) for name, value in variables.items() if port is not None}
    arguments = [path, *(word.format(rank=rank) for word in words)]
    os.chdir(folder)
    said = io.StringIO()
    with mock.patch.dict(os.environ, launched), mock.patch.object(sys, "argv", arguments), contextlib.redirect_stdout(said):
        runpy.run_path(path, run_name="__main__")
    gc.collect()  # a script that unwraps nothing leaves its models in cycles
    return said.getvalue()


def _receive(receiver: connection.Connection) -> tuple[str, Any]:
    with receiver:
        try:
            return pickle.loads(receiver.recv_bytes())
        except EOFError:
            return "died", "ended without an answer: it was killed, or crashed"


def _be_rank(sender: connection.Connection, rank: int, world_size: int, store: str, timeout: float, job: bytes) -> None:
    # Seconds before the parent kills, every thread's stack goes to stderr, which pytest shows.
    faulthandler.enable()
    faulthandler.dump_traceback_later(max(timeout - 2, 1), exit=False)
    try:
        answer = ("returned", _run(rank, world_size, store, job))
    except BaseException:
        answer = ("raised", traceback.format_exc())
    with contextlib.suppress(BrokenPipeError):
        sender.send_bytes(pickle.dumps(answer))
    sender.close()
    os._exit(0)


def _run(rank: int, world_size: int, store: str, job: bytes) -> Any:
    import torch
    import torch.distributed as dist

    os.environ["GLOO_SOCKET_IFNAME"] = "lo"  # whatever this machine's name resolves to
    torch.set_num_threads(1)
    module_name, file, name, backend, args = pickle.loads(job)
    fn = load_module(module_name, file)
    for part in name.split("."):
        fn = getattr(fn, part)
    if backend is not None:
        meeting = dist.FileStore(store, world_size)
        dist.init_process_group(backend, store=meeting, rank=rank, world_size=world_size, timeout=timedelta(seconds=60))
    if backend == "gloo":
        dist.barrier()  # a rank that is done at once would cut off those that still connect
    torch.manual_seed(1 + rank)
    environment = _own_variables()
    value = fn(rank, world_size, *pickle.loads(args))
    deadline = time.monotonic() + GRACE_SECONDS
    while (left := own_threads()) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not left, f"left threads: {left}; close() the replica"
    assert _own_variables() == environment, "changed environment variables"
    if backend is not None:
        dist.destroy_process_group()
    return value


def _own_variables() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name not in OTHERS_VARIABLES}


def load_module(name: str, file: str) -> Any:
    """A test module by its file: under importlib mode pytest puts it on no path."""
    spec = importlib.util.spec_from_file_location(name, file)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
