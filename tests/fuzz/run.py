"""How ranks run a program: resident processes that take programs over pipes, and are made anew after a failure.

Threads of one process work too (real gloo, `torch.distributed`'s world made local to threads). But they are half as fast, they
share torch's random generators, and an abort on one rank ends all.
"""

from __future__ import annotations

import contextlib
import faulthandler
import multiprocessing
import os
import pickle
import re
import tempfile
import time
import traceback
from dataclasses import dataclass, field
from datetime import timedelta
from multiprocessing import connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import lightning_accel as accel
from fuzz.loop import Loop, Planned
from fuzz.programs import Program, Resume
from helpers.ranks import PRELOADED

COLLECTIVE_SECONDS = 5.0
"""Timeout of a collective."""

PROGRAM_SECONDS = 20.0
"""Time for a program; then it is stuck."""

GRACE_SECONDS = 12.0
"""Time for the other ranks, once one has failed: the timeout of a collective, and some."""

_PROGRAMS_A_PROCESS = 400
"""torch never forgets the names of groups."""


@dataclass
class Outcome:
    """What became of one rank.

    Attributes:
        status: "done", "raised", "died" or "stuck".
        error: Type and message, for "raised"; the signal for "died".
        is_typed: Whether the error is one that the package promises.
        where: End of the traceback.
        tensors: Of the model, by name, after the last consensus.
        trainable: Names of the parameters that need a gradient.
        drift: How far each weight is from its start.
        updates, paths, applied: See `Loop`.
        peaks: Largest gradient of any rank, times the number of optimizers that have used it, by name; of simulations.
    """

    status: str
    error: str = ""
    is_typed: bool = True
    where: str = ""
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    trainable: tuple[str, ...] = ()
    drift: dict[str, torch.Tensor] = field(default_factory=dict)
    updates: dict[str, torch.Tensor] = field(default_factory=dict)
    paths: dict[str, float] = field(default_factory=dict)
    applied: dict[str, torch.Tensor] = field(default_factory=dict)
    peaks: dict[str, float] = field(default_factory=dict)


def outcome_of(loop: Loop) -> Outcome:
    """What a loop that is done has come to."""
    network = loop.network
    tensors = {**dict(network.named_parameters()), **dict(network.named_buffers())}
    drift = {name: weight.detach().double() - loop.first(name).double() for name, weight in network.named_parameters()}
    return Outcome(
        "done",
        tensors={name: tensor.detach().clone() for name, tensor in tensors.items()},
        trainable=tuple(name for name, weight in network.named_parameters() if weight.requires_grad),
        drift=drift,
        updates=loop.updates,
        paths=loop.paths,
        applied=loop.applied,
    )


class Pool:
    """Ranks that wait for programs; leaves no process behind at the end of a `with`."""

    def __init__(self) -> None:
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload([*PRELOADED, "lightning_accel.data_parallel.wrap", "fuzz.run"])
        self._ranks: dict[int, list[tuple[multiprocessing.Process, connection.Connection]]] = {}
        self._runs: dict[int, int] = {}
        self.programs = 0

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *error: object) -> None:
        for world_size in list(self._ranks):
            self._end(world_size)

    def run(self, program: Program) -> list[Outcome]:
        """Runs a program on all of its ranks, in bounded time."""
        n = program.ranks
        self.programs += 1
        if self._runs.get(n, 0) >= _PROGRAMS_A_PROCESS:
            self._end(n)
        if n not in self._ranks:
            self._start(n)
        self._runs[n] += 1
        with tempfile.TemporaryDirectory() as folder:
            job = pickle.dumps((program, folder))
            outcomes: dict[int, Outcome] = {}
            for rank, (_, pipe) in enumerate(self._ranks[n]):
                try:
                    pipe.send_bytes(job)
                except BrokenPipeError:
                    outcomes[rank] = self._died(n, rank)
            deadline = time.monotonic() + PROGRAM_SECONDS
            while len(outcomes) < n:
                waiting = {pipe: rank for rank, (_, pipe) in enumerate(self._ranks[n]) if rank not in outcomes}
                ready = connection.wait(list(waiting), max(deadline - time.monotonic(), 0))
                for pipe in ready:
                    rank = waiting[pipe]
                    try:
                        outcomes[rank] = pickle.loads(pipe.recv_bytes())
                    except (EOFError, ConnectionResetError):
                        outcomes[rank] = self._died(n, rank)
                    if outcomes[rank].status != "done":
                        deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
                if not ready:
                    outcomes |= {rank: Outcome("stuck") for rank in waiting.values()}
            if any(outcome.status != "done" for outcome in outcomes.values()):
                self._end(n)
        return [outcomes[rank] for rank in range(n)]

    def _died(self, world_size: int, rank: int) -> Outcome:
        process = self._ranks[world_size][rank][0]
        process.join(1)
        return Outcome("died", error=f"exit code {process.exitcode}", is_typed=False)

    def _start(self, world_size: int) -> None:
        ranks, address = [], None
        for rank in range(world_size):
            here, there = self._context.Pipe()
            process = self._context.Process(target=_be_rank, args=(there, rank, world_size, address), daemon=True)
            process.start()
            there.close()
            if rank == 0:
                address = here.recv()
            ranks.append((process, here))
        for _, pipe in ranks:
            pipe.recv()
        self._ranks[world_size], self._runs[world_size] = ranks, 0

    def _end(self, world_size: int) -> None:
        for process, pipe in self._ranks.pop(world_size):
            process.kill()
            process.join()
            process.close()
            pipe.close()


def _be_rank(pipe: connection.Connection, rank: int, world_size: int, port: int | None) -> None:
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    if "FUZZ_STACKS" not in os.environ:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # gloo's last words, of programs that are to abort
    torch.set_num_threads(1)
    timeout = timedelta(seconds=COLLECTIVE_SECONDS)
    store = dist.TCPStore("127.0.0.1", port or 0, is_master=rank == 0, wait_for_workers=False)
    if rank == 0:
        pipe.send(store.port)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=timeout)
    dist.barrier()
    pipe.send("ready")
    with contextlib.suppress(EOFError, BrokenPipeError):
        while True:
            program, folder = pickle.loads(pipe.recv_bytes())
            if "FUZZ_STACKS" in os.environ:
                faulthandler.dump_traceback_later(PROGRAM_SECONDS - 2, exit=False)
            pipe.send_bytes(pickle.dumps(_run(program, rank, Path(folder))))
            faulthandler.cancel_dump_traceback_later()
    os._exit(0)


def _run(program: Program, rank: int, folder: Path) -> Outcome:
    os.environ["GROUP_RANK"] = str(rank * program.nodes // program.ranks)
    torch.manual_seed(rank)
    loop = None
    try:
        loop = Loop(program, rank, _wrap_as(program), _resume_in(folder))
        for _ in loop.run():
            pass
        accel.unwrap(loop.ddp)
        return outcome_of(loop)
    except BaseException as error:
        where = "".join(traceback.format_tb(error.__traceback__)[-3:])
        return Outcome("raised", f"{type(error).__name__}: {error}", _is_typed(error), where)
    finally:
        if loop is not None:
            loop.ddp.replica.close()  # what the end of a `with` block does


def _wrap_as(program: Program) -> Any:
    def wrap(network: torch.nn.Module, told: list[torch.optim.Optimizer], bucket_cap_mb: float) -> Any:
        options = {**program.options, "bucket_cap_mb": bucket_cap_mb}
        if program.is_toggled:
            options["find_unused_parameters"] = True
        return accel.wrap(network, told, program.algorithm, timeout=timedelta(seconds=COLLECTIVE_SECONDS), **options)

    return wrap


def _resume_in(folder: Path) -> Any:
    def resume(loop: Loop, operation: Resume) -> None:
        path = folder / "last.pt"
        accel.save_checkpoint(path, loop.ddp, loop.optimizers)
        if not loop.program.uninterrupted:
            accel.unwrap(loop.ddp)
            loop.make(operation.bucket_cap_mb)
            accel.load_checkpoint(path, loop.ddp, loop.optimizers)

    return resume


_FOREIGN = re.compile(r"gloo|\.c(c|pp):\d|Connection (closed|reset)|Broken pipe|Timed out|Socket Timeout", re.IGNORECASE)


def _is_typed(error: BaseException) -> bool:
    """Whether it is the planned error, or one of ours: a CommunicationError, or one that our own code has raised."""
    if isinstance(error, (Planned, accel.CommunicationError)):
        return True
    last = traceback.extract_tb(error.__traceback__)[-1].filename
    is_ours = "lightning_accel" in last and isinstance(error, (ValueError, RuntimeError))
    return is_ours and _FOREIGN.search(str(error)) is None
