"""The process groups that a communicator owns: made, ended by force, given back."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Protocol

import torch
import torch.distributed as dist
from torch.distributed.constants import default_pg_timeout

from lightning_accel.transport.gloo import backend_of
from lightning_accel.transport.group import Group
from lightning_accel.transport.tcp_keepalive import open_sockets, watch_connections


class DeviceCollective(Protocol):
    """Communication that enqueues itself on a GPU, past any process group, where no call of ours hears of its failure."""

    def check(self) -> None:
        """Raises if it has failed; does not wait."""

    def abort(self) -> None:
        """Lets it fail, on this rank; does not wait."""

    def close(self) -> None:
        """Waits for what is under way, and ends it."""


class OwnedGroups:
    """Process groups over the ranks of another one, which carries nothing itself.

    Args:
        parent: Process group whose ranks take part; None is the default group.
        device: Device of the tensors.
        timeout: Timeout of a collective; None takes the parent's.

    Attributes:
        parent: See above.
        rank: This process's rank in the parent.
        world_size: Number of ranks in the parent.
        timeout: Timeout of a collective.
    """

    def __init__(self, parent: dist.ProcessGroup | None, device: torch.device, timeout: timedelta | None) -> None:
        parent = parent if parent is not None else dist.group.WORLD
        assert parent is not None, "torch.distributed has no default process group"
        self.parent = parent
        self.timeout = timeout or _timeout_of(parent, device)
        self.rank = dist.get_rank(parent)
        self.world_size = dist.get_world_size(parent)
        self._device = device
        self._groups: list[Group] = []
        self._owned: list[dist.ProcessGroup] = []
        self._device_collectives: list[DeviceCollective] = []
        self._ending: threading.Thread | None = None

    def new(self, parts: Sequence[tuple[int, ...]], backend: str | None = None) -> Group:
        """Makes the group of each part of the ranks, and returns the one with this rank. Collective.

        Args:
            parts: Ranks of each group; each rank is in one of them.
            backend: Backend of the groups; None takes the parent's.
        """
        own = next(part for part in parts if self.rank in part)
        if len(own) == 1 and self.world_size > 1:
            return Group(None)
        # Where the parent is the world, every rank makes all groups: torch then numbers them, and never twice alike. Groups
        # made by their members alone have the name of one that was closed before, and find its addresses in the store.
        is_world = self.parent is dist.group.WORLD
        others = open_sockets()
        if backend is None and (backend := dist.get_backend(self.parent)) == dist.Backend.UNDEFINED:
            backend = dist.get_backend_config(self.parent)
        for part in parts if is_world else [own]:
            process_group = dist.new_group(
                [dist.get_global_rank(self.parent, rank) for rank in part],
                timeout=self.timeout,
                backend=backend,
                use_local_synchronization=not is_world,
            )
            if part == own:
                self._owned.append(process_group)
        if backend_of(self._owned[-1], torch.device("cpu")) == "gloo":
            # A rank that closes the group at once would cut off those that still connect.
            dist.all_reduce(torch.zeros(1, dtype=torch.int32, device="cpu"), group=self._owned[-1])
            watch_connections(others)
        self._groups.append(Group(self._owned[-1]))
        return self._groups[-1]

    def add(self, collective: DeviceCollective) -> None:
        """Checks, aborts and closes a device collective with the groups from now on."""
        self._device_collectives.append(collective)

    def check(self) -> None:
        """Raises if a device collective has failed; does not wait."""
        for collective in self._device_collectives:
            collective.check()

    def synchronize(self) -> None:
        """Waits for device collectives, so that a failure on a GPU is seen by the next `check`."""
        if self._device_collectives and self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def abandon(self) -> None:
        """Closes connections, so that what waits for one of them fails now, here and on peers; does not wait."""
        for collective in self._device_collectives:  # first: closing what waits on a GPU takes as long as it waits
            collective.abort()
        self._start("abandon", self._abort)

    def close(self, seconds: float) -> None:
        """Gives all groups back; waits at most so long, and never raises."""
        if self._ending is None:
            self._start("close", self._destroy)
        if self._ending is not None and self._ending.is_alive():
            self._ending.join(seconds)

    def _start(self, name: str, action: Callable[[], None]) -> None:
        """Starts a thread: ending groups waits for the backend's threads, and the caller may be one; or for an absent peer."""
        self._ending = threading.Thread(target=action, name=f"lightning_accel {name}", daemon=True)
        with contextlib.suppress(RuntimeError):  # an interpreter that ends starts no threads, and closes anyway
            self._ending.start()

    def _abort(self) -> None:
        for group in self._groups:
            group.abort()
        self._destroy()

    def _destroy(self) -> None:
        while self._device_collectives:
            with contextlib.suppress(Exception):
                self._device_collectives.pop().close()
        # Nothing may keep the groups from here on. Connections close with the last reference; and one dropped by a callback,
        # on a thread of the group itself, would wait for that thread.
        for group in self._groups:
            group.process_group = None
        while self._owned:
            process_group = self._owned.pop()
            with contextlib.suppress(Exception):
                dist.destroy_process_group(process_group)
            del process_group


def _timeout_of(process_group: dist.ProcessGroup, device: torch.device) -> timedelta:
    # A group made of another one has torch's default, not the other's.
    options = getattr(process_group._get_backend(device), "options", None)
    timeout: timedelta = getattr(options, "_timeout", default_pg_timeout)
    return timeout
