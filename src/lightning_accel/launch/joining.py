"""Brings all ranks of a program together: in a store first, then in torch.distributed's default process group."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from functools import partial

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore, PrefixStore, Store, TCPStore

from lightning_accel.background.failure import CommunicationError
from lightning_accel.transport.gloo import backend_of
from lightning_accel.transport.long_waits import LongWait, name_ranks
from lightning_accel.transport.tcp_keepalive import open_sockets, watch_connections

_POLL_SECONDS = 0.02
_RETRY_SECONDS = 0.2
_ANSWER_SECONDS = 2.0
"""Longest wait for one connection to be answered; Ctrl-C is heard between two."""

_joins = 0
"""How many times this process has met all others."""


@dataclass(frozen=True)
class Rendezvous:
    """Where a process meets all others.

    Attributes:
        rank: Rank of this process.
        world_size: Number of processes.
        host: Name or address of the host that has the store.
        port: Its port.
        timeout: Longest wait for the others, and timeout of each collective.
        attempt: Number of torchrun's attempt if its agent has the store, so that an earlier attempt's entries are not found;
            None if rank 0 has it.
        store: Store to use instead; then `host`, `port` and `attempt` are ignored.
    """

    rank: int
    world_size: int
    host: str
    port: int
    timeout: timedelta
    attempt: str | None = None
    store: Store | None = None

    def join(self, backend: str, device: torch.device | None = None) -> None:
        """Makes the default process group, once all ranks are there. Collective.

        A wait of ten seconds or more is logged, with the ranks that are missing. A process may join again after its group was
        destroyed.

        Args:
            backend: Backend of the group.
            device: GPU that the group is bound to, if any.

        Raises:
            CommunicationError: Ranks are missing when the time is over.
            RuntimeError: Rank 0 cannot listen at its port.
        """
        earlier_sockets = open_sockets()
        store = self._meet()
        dist.init_process_group(
            backend, store=store, rank=self.rank, world_size=self.world_size, timeout=self.timeout, device_id=device
        )
        assert dist.group.WORLD is not None
        if backend_of(dist.group.WORLD, torch.device("cpu")) == "gloo":
            # A rank that exited right away would cut off ranks that are still connecting.
            try:
                dist.all_reduce(torch.zeros(1, dtype=torch.int32, device="cpu"))
            except BaseException:
                dist.destroy_process_group()
                raise
        watch_connections(earlier_sockets)

    def _meet(self) -> Store:
        """Returns a part of the store in which nobody has met before, once all ranks are there."""
        global _joins
        if self.world_size == 1:
            return HashStore()  # needs no port: another process may have taken it
        # An agent's store outlives the ranks, and rank 0's may outlive its group, since DDP keeps it: they still hold the
        # addresses of connections that are gone.
        parts = [f"attempt {self.attempt}"] if self.store is None and self.attempt is not None else []
        parts += [f"join {_joins}"] if _joins else []
        wait = LongWait()
        while True:
            try:
                store = self.store if self.store is not None else self._connect(wait)
                store = PrefixStore(" ".join(["lightning_accel", *parts]), store) if parts else store
                self._wait_for_all(store, wait)
            except dist.DistError as error:
                if self._has_store or self.store is not None:
                    raise
                # It was the store of an earlier group, which rank 0 has left only now. The next one will come.
                self._go_on(wait, partial(self._describe, "1 or more", f"the store is gone ({error})"))
                time.sleep(_RETRY_SECONDS)
            else:
                _joins += 1
                return store

    def _connect(self, wait: LongWait) -> Store:
        if self._has_store:
            try:
                # Multi-tenant: an earlier store of this process may have the port still.
                return self._open_store(multi_tenant=True)
            except dist.DistNetworkError as error:
                raise RuntimeError(f"rank 0 cannot listen at port {self.port}, which must be free: {error}") from error
        while True:
            try:
                # torch tries for as long as the timeout says, deaf to Ctrl-C, and writes many lines.
                socket.create_connection((self.host, self.port), _ANSWER_SECONDS).close()
                return self._open_store(multi_tenant=False)
            except OSError as error:
                owner = "rank 0" if self.attempt is None else "torchrun's agent on the first node"
                why = f"{owner} does not answer ({error})"
            self._go_on(wait, partial(self._describe, "1 or more", why))
            time.sleep(_RETRY_SECONDS)

    def _open_store(self, *, multi_tenant: bool) -> Store:
        return TCPStore(
            self.host,
            self.port,
            self.world_size,
            is_master=self._has_store,
            timeout=self.timeout,
            wait_for_workers=False,
            multi_tenant=multi_tenant,
        )

    def _wait_for_all(self, store: Store, wait: LongWait) -> None:
        """Says that this rank is there, and waits until all are."""

        def describe() -> str:
            missing = [rank for rank in range(first, self.world_size) if not store.check([f"rank {rank}"])] or [first]
            return self._describe(str(len(missing)), f"{name_ranks(missing)} {'has' if len(missing) == 1 else 'have'} not come")

        store.set(f"rank {self.rank}", "here")
        first = 0  # one question at a time, however many ranks there are
        while first < self.world_size:
            if store.check([f"rank {first}"]):
                first += 1
            else:
                self._go_on(wait, describe)
                time.sleep(_POLL_SECONDS)

    def _describe(self, count: str, why: str) -> str:
        place = "the store given" if self.store is not None else f"{self.host}:{self.port}"
        return f"Waiting for {count} of {self.world_size} ranks at {place}, on rank {self.rank}: {why}"

    def _go_on(self, wait: LongWait, describe: Callable[[], str]) -> None:
        """Logs a wait that is long, and ends one that is too long."""
        wait.look(describe)
        if wait.seconds > self.timeout.total_seconds():
            raise CommunicationError(
                f"{describe()}, and the time is over after {wait.seconds:.0f} s. Look whether they were started, with this "
                "address and the same number of ranks, and whether a firewall is in between"
            )

    @property
    def _has_store(self) -> bool:
        return self.rank == 0 and self.attempt is None
